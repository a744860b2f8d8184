"""The wording of TRACE's variant with reasoning: its prompts made of the plain ones, its answers written and
read.

Markers between reasoning and answer: "\n回答：" (C-STANCE), "… summary of the meeting transcripts is:"
(MeetingBank), "\nAnswer:" elsewhere; Py150 has the answer first, then "\nReasoning:". Tasks that are not
TRACE's keep their prompts.
"""

HINT = " Give your reasoning first, and then the answer."

LABELS = {
    "FOMC": "Stance:",
    "MeetingBank": "Summary:",
    "ScienceQA": "Answer:",
    "NumGLUE-cm": "Answer:",
    "NumGLUE-ds": "Answer:",
    "20Minuten": "Simplification:",
}

CODE = "Complete the next line of the following codes. Give your answer first, and then the reasoning.\n"
MARKERS = {"C-STANCE": "\n回答：", "MeetingBank": "summary of the meeting transcripts is:"}

# What stands between reasoning and answer, where that is more than the marker.
LEADS = {"MeetingBank": "Therefore, the summary of the meeting transcripts is:\n"}


def reasoned_prompt(task: str, prompt: str) -> str:
    """A prompt of the plain variants in the form of the variant with reasoning."""
    if task == "Py150":
        return CODE + prompt
    first, _, rest = prompt.partition("\n")
    if task == "C-STANCE":
        return f"{first}先给出推理，然后给出答案。\n{rest.removesuffix('态度：')}推理："
    if task not in LABELS:
        return prompt
    first = first.replace(" and give your reasons.", ".")
    return f"{first}{HINT}\n{rest.lstrip(chr(10)).removesuffix(LABELS[task])}Reasoning:"


def reasoned_answer(task: str, reasoning: str, answer: str) -> str:
    """What is to be generated: reasoning, marker and answer, in the task's order."""
    if task == "Py150":
        return f"{answer}\nReasoning:{reasoning}"
    return f"{reasoning}{LEADS.get(task) or _marker(task)}{answer}"


def read_answer(task: str, output: str) -> str:
    """The answer in an output, stripped; "" where the marker is missing."""
    if task == "Py150":
        return output.split("\nReasoning:")[0].strip()
    parts = f"\n{output}".split(_marker(task))
    return parts[1].strip() if len(parts) > 1 else ""


def _marker(task: str) -> str:
    return MARKERS.get(task, "\nAnswer:")
