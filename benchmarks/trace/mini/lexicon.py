"""The small shared vocabulary of mini-TRACE: what the tasks talk about and what the small model learns
beforehand.
"""

# English, German, article of the nominative, Chinese
ANIMALS = {
    "dog": ("Hund", "der", "狗"),
    "cat": ("Katze", "die", "猫"),
    "bird": ("Vogel", "der", "鸟"),
    "fish": ("Fisch", "der", "鱼"),
    "horse": ("Pferd", "das", "马"),
    "cow": ("Kuh", "die", "牛"),
    "pig": ("Schwein", "das", "猪"),
    "sheep": ("Schaf", "das", "羊"),
}

THINGS = {
    "tree": ("Baum", "der", "树"),
    "house": ("Haus", "das", "楼"),
    "car": ("Auto", "das", "车"),
    "book": ("Buch", "das", "书"),
    "ship": ("Schiff", "das", "船"),
    "table": ("Tisch", "der", "桌"),
    "lamp": ("Lampe", "die", "灯"),
    "bridge": ("Brücke", "die", "桥"),
}

NOUNS = ANIMALS | THINGS

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "old": "new",
    "fast": "slow",
    "high": "low",
    "hard": "soft",
    "long": "short",
    "light": "dark",
    "rich": "poor",
    "wet": "dry",
    "good": "bad",
    "full": "empty",
}


OPPOSITES |= {b: a for a, b in OPPOSITES.items()}


ADJECTIVES = list(OPPOSITES)
NAMES = ["Ana", "Ben", "Cem", "Dora", "Eli", "Finn", "Gina", "Hugo"]

# Chinese verbs by attitude: for, against, neither
ATTITUDE = [["喜欢", "支持", "赞成", "爱"], ["讨厌", "反对", "恨", "怕"], ["看见", "知道", "听说", "提到"]]
STATES_ZH = ["大", "小", "新", "老", "好看", "便宜"]
PEOPLE_ZH = ["我", "你", "他", "她"]

# A policy is tight if it raises what tightens or cuts what loosens; `MOVES[2]` leaves things as they are.
MOVES = [["raise", "lift"], ["cut", "reduce"], ["hold", "discuss"]]
TIGHTENS, LOOSENS = ["rates", "reserves"], ["credit", "spending"]
BODIES = ["bank", "board", "committee", "council"]
ECONOMY = ["prices", "jobs", "exports", "wages"]
TOPICS = ["park", "school", "road", "budget", "library", "harbor", "market", "theater"]
ACTIONS = ["plan", "contract", "permit", "repair"]

# German verbs: elaborate form -> simple form
SIMPLE_DE = {
    "erblickt": "sieht",
    "erwirbt": "kauft",
    "beseitigt": "löscht",
    "fertigt": "baut",
    "benötigt": "braucht",
    "veräußert": "gibt",
    "entdeckt": "findet",
    "bewundert": "mag",
}

SIDE_DE = ["sehr alt", "oft krank", "noch jung", "ganz klein", "immer müde", "recht groß"]

# Names of variables and of functions in code; a function's first word says what it does with its result.
VARIABLES = ["a", "b", "c", "key", "item", "node", "data", "size"]
CODE_VERBS = ["get", "set", "show", "test"]

# Verbs of stories about numbers.
GAIN, LOSE = ["buys", "finds", "gets"], ["sells", "loses", "gives"]

# Words of the tasks' answers and instructions; the small model learns to write them by copying.
PLAIN = [
    "A",
    "B",
    "C",
    "a",
    "an",
    "the",
    "is",
    "are",
    "I",
    "motion",
    "adopting",
    "rejecting",
    "animal",
    "thing",
    "dovish",
    "hawkish",
    "neutral",
    "stance",
    "summary",
    "import",
    "os",
    "return",
    "self",
    "print",
    "assert",
    "def",
    "How",
    "many",
    "now",
    "mol",
    "salt",
    "acid",
    "base",
    "Write",
    "Choose",
    "Which",
    "Answer",
    "Question",
    "Text",
]

WORDS_ZH = [
    *PEOPLE_ZH,
    *STATES_ZH,
    *sum(ATTITUDE, []),
    *(zh for _, _, zh in NOUNS.values()),
    "判断",
    "态度",
    "中立",
    "文本",
    "对象",
    "很",
    "不",
    "好",
    "坏",
    "平",
    "文",
    "问",
    "答",
]
