"""The report: what the page holds, that foreign text stays text, that it loads nothing, and what several runs
say together.
"""

import csv
import html
import io
import math
import re
import shutil

import numpy as np
import pytest
from helpers import main_ends
from made_runs import EVIL, MATRIX, TASKS, Page, make, written
from scipy.stats import t

from codyra_llm.core.errors import Fault
from codyra_llm.core.files import read_jsonl, write_json, write_jsonl
from codyra_llm.evaluate.matrix import FORMULAS
from codyra_llm.report import grid
from codyra_llm.report.groups import Member, grouped
from codyra_llm.report.html import charts, many_runs, one_run, page
from codyra_llm.report.html.forgotten import readable
from codyra_llm.store.folder import RunFolder
from codyra_llm.store.rows import UpdateRow


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return make(tmp_path_factory.mktemp("runs") / "one")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Two groups, codyra and seqlora, of three seeds each, given in turn; a third of one seed."""
    root = tmp_path_factory.mktemp("runs")
    lifts = {"codyra": (0.0, 1.0, 3.5), "seqlora": (-2.0, -0.5, 1.0)}
    grid = [
        make(
            root / f"{name}-{seed}",
            lift=lifts[name][seed],
            lose=7.0 * (name == "seqlora"),
            seed=seed,
            method={"name": name, "rank": 4},
        )
        for seed in range(3)
        for name in lifts
    ]
    return [*grid, make(root / "rank-8", method={"name": "codyra", "rank": 8}, seed=0)]


def test_what_the_pointer_shows_is_in_words_too(one, tmp_path):
    """A title is out of reach for the keyboard and for most screen readers."""
    source = written([one], tmp_path / "x.html")
    hints = {html.unescape(hint) for hint in re.findall(r' title="([^"]*)"', source)}
    details = re.findall(r"<details><summary>About the .*?</details>", source, re.DOTALL)
    said = html.unescape(" ".join(details))
    assert hints and all(f": {hint}</li>" in said for hint in hints)


def test_hints_are_told_once_for_each_column():
    def cell(hint):
        return grid.Cell(1, "1", hint=hint)

    rows = [("floor", [cell("two: yes"), None]), ("1", [cell("two"), None]), ("2", [cell("two"), cell("x")])]
    told = [("A", "two"), ("B", "x"), ("floor, A", "two: yes")]
    assert grid.Grid("g", "", ["A", "B"], rows).hints() == told
    assert grid.Grid("g", "", ["A"], [("1", [grid.word("a")]), ("2", [None])]).hints() == []


def test_the_page_of_a_run_holds_every_number(one, tmp_path):
    source = written([one], tmp_path / "x.html")
    texts = Page(source).texts
    for value in (v for row in [[20, 21, 22], *MATRIX] for v in row if v is not None):
        assert f"{value:.1f}" in texts and f"{value - 4:.0f}–{value + 3:.0f}" in texts
    bwt = (55 - 80 + 50 - 71.25) / 2
    for value in ((55 + 50 + 61) / 3, bwt, -2 * bwt / 3, -bwt):
        assert f"{value:.2f}" in texts
    assert all(html.unescape(formula) in texts for formula in FORMULAS.values())
    assert {"90.0", "85.0", "-5.0"} <= set(texts)  # general ability
    assert (
        texts.count("1,234") == 3 and texts.count("128") == 3 and texts.count("320") == 3
    )  # parameters, tokens/s, tokens
    assert {"0.500", "1.500", "0.7500", "codyra-llm run recipe.json"} <= set(texts)
    maps = re.findall(r'<figure class="table map">.*?</figure>', source, re.DOTALL)
    assert sum(text.count('<td class="heat ') for text in maps) == 6
    assert all('<span class="note">of 4</span>' in text for text in maps)
    assert '"rank": 4' in "".join(texts) and "80.0 → 55.0" in texts


@pytest.mark.parametrize("several", [False, True])
def test_foreign_text_stays_text_and_nothing_is_loaded(one, many, several, tmp_path):
    source = written(many if several else [one], tmp_path / "x.html")
    found = Page(source)
    assert found.open == found.wrong == []
    assert not found.tags & {"script", "img", "link", "iframe", "object", "embed", "x", "b|c"}
    assert not [
        name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href", "xlink:href")
    ]
    assert not re.search(r"https?://|url\(|@import", source)
    assert any(
        name == "content" and value.startswith("default-src 'none'") for name, value in found.attributes
    )
    assert any(TASKS[0] in text for text in found.texts)
    if not several:
        assert EVIL in found.texts and EVIL + "wrong" in found.texts and "yes␛" in found.texts


@pytest.mark.parametrize("several", [False, True])
def test_the_page_can_be_read_without_a_mouse_or_colours(one, many, several, tmp_path):
    """What scrolls takes the focus and has a name, no header is empty, and a mark is told as text too."""
    source = written(many if several else [one], tmp_path / "x.html", paper=True)
    begun = re.findall(r'<div class="scroll"[^>]*>', source)
    assert begun and all(re.search('tabindex="0" role="group" aria-label="[^"]+"', tag) for tag in begun)
    assert not re.search(r"<th[^>]*>\s*</th>", source) and "<th>" not in source
    marked = re.findall(r'<td class="[^"]*marked[^"]*".*?</td>', source, re.S)
    assert len(marked) >= 1 and all('<span class="unseen"> (marked)</span>' in cell for cell in marked)


def test_examples_are_those_that_fell_and_can_be_left_out(one, tmp_path):
    source = written([one], tmp_path / "x.html")
    assert "1 of 2 fell" in source and "kept" not in Page(source).texts
    without = written([one], tmp_path / "y.html", examples=False)
    assert not {EVIL, EVIL + "wrong", "yes␛"} & set(Page(without).texts)
    assert main_ends(["report", str(one.path), "--out", str(tmp_path / "z.html"), "--no-examples"]) == 0
    assert (tmp_path / "z.html").read_text(encoding="utf-8") == without


def test_long_texts_keep_both_ends():
    cut = readable("a" * 500 + "b" * 5000 + "c" * 500, 300)
    assert len(cut) < 320 and cut.startswith("a" * 100 + " ") and cut.endswith(" " + "c" * 200)


def test_the_page_stays_small(tmp_path):
    folder = make(tmp_path / "run")
    updates = [
        {
            "task": task,
            "site": f"model.layers.{layer}.self_attn.{name}_proj",
            "rank": 64,
            "kept": layer,
            "update_norm": 1.0,
            "drift": 1.0,
            "surviving": 1.0,
        }
        for task in TASKS
        for layer in range(80)
        for name in "qkvogud"
    ]
    write_jsonl(folder.path / "updates.jsonl", updates)
    write_jsonl(
        folder.path / "log.jsonl",
        [
            {
                "task": task,
                "step": s,
                "steps": 4000,
                "loss": math.sin(s) + 2,
                "lr": 1e-3,
                "tokens": 9,
                "seconds": 1.0,
            }
            for task in TASKS
            for s in range(4000)
        ],
    )
    file = folder.path / "predictions" / f"01-{TASKS[0]}" / f"{TASKS[0]}.jsonl"
    write_jsonl(file, [row | {"prompt": "x" * 10**6} for row in read_jsonl(file)])
    assert len(written([folder], tmp_path / "x.html").encode()) < 400_000


def test_what_a_folder_lacks_is_left_out(tmp_path):
    folder = make(tmp_path / "run")
    whole = Page(written([folder], tmp_path / "x.html")).texts
    parts = {
        "log.jsonl": "loss",
        "updates.jsonl": "What each task changed",
        "predictions": "Examples of forgetting",
        "manifest.json": "Manifest",
        "scores.jsonl": "Scores",
        "costs.jsonl": "costs of training",
    }
    for name, title in parts.items():
        file = folder.path / name
        shutil.rmtree(file) if file.is_dir() else file.unlink()
        texts = Page(written([folder], tmp_path / "x.html")).texts
        assert title in whole and title not in texts
    assert "codyra on 3 tasks" in texts and not any("Not finished: 0 of 3" in text for text in whole)
    assert any("Not finished: 0 of 3 tasks" in text for text in texts)


def test_runs_are_grouped_by_recipe_and_their_spread_is_numpys(many, tmp_path):
    rows = parsed(many, tmp_path / "x.csv")
    assert [row["value"] for row in rows["runs", "group"]] == ["1 codyra"] * 3 + ["2 seqlora"] * 3 + [
        "3 codyra rank=8"
    ]
    op = {
        key: np.array(value) + 166 / 3
        for key, value in {"codyra": [0, 1, 3.5], "seqlora": [-2, -0.5, 1]}.items()
    }
    op["seqlora"] -= 7 / 3
    board = {row["row"]: row for row in rows["leaderboard", "OP"]}
    assert list(board) == ["1 codyra", "3 codyra rank=8", "2 seqlora"]  # the highest first
    for name, values in (("1 codyra", op["codyra"]), ("2 seqlora", op["seqlora"])):
        half = t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
        low, mean, high = (float(board[name][key]) for key in ("low", "value", "high"))
        assert mean == pytest.approx(values.mean()) and (high - mean, mean - low) == pytest.approx(
            (half, half)
        )
        assert f"sd {values.std(ddof=1):.1f}" in written(many, tmp_path / "x.html")
    changes = {row["row"]: float(row["value"]) for row in rows["leaderboard", "ΔR"]}
    assert changes == dict.fromkeys(board, -5.0)  # 90 before, 85 after
    assert board["3 codyra rank=8"]["low"] == ""  # one seed says nothing of the spread
    paired = {row["row"]: row for row in rows["paired differences", "OP"]}
    assert float(paired["2 seqlora"]["value"]) == pytest.approx((op["seqlora"] - op["codyra"]).mean())
    assert [row["value"] for row in rows["paired differences", "pairs"]] == ["3", "1"]
    forgetting = {row["row"]: float(row["value"]) for row in rows["paired differences", "forgetting"]}
    assert forgetting["2 seqlora"] == pytest.approx(3.5)  # 7 points on one of two old tasks
    assert {
        (row["row"], row["column"]) for key, cells in rows.items() if key[0] == "settings" for row in cells
    } >= {("method.rank", "1"), ("method.rank", "3")}


@pytest.mark.parametrize(
    "otherwise, named",
    [
        ({"data__tasks": TASKS[:2] + ["E"]}, "tasks learnt"),
        ({"eval__split": "eval"}, "split"),
        ({"eval__max_examples": 50}, "examples scored"),
    ],
)
def test_scores_that_were_measured_otherwise_are_not_compared(tmp_path, otherwise, named):
    """No best one is marked and no difference given, and the page says why; general ability still compares,
    as it does between runs of other bases and orders."""
    first = make(tmp_path / "a")
    other = make(tmp_path / "b", lift=5.0, **otherwise)
    rows = parsed([first, other], tmp_path / "x.csv")
    assert ("paired differences", "OP") not in rows and ("paired differences", "ΔR") in rows
    text = written([first, other], tmp_path / "x.html")
    assert f"Runs here differ in {named}" in text
    board = many_runs.content([Member(first), Member(other)])["leaderboard"]
    assert "OP" not in board.better and board.better["ΔR"] == 1
    alike = make(tmp_path / "c", lift=5.0, model__path="another/base", seed=7)
    write_json(alike.path / "manifest.json", alike.manifest | {"base": "1" * 64})
    assert "Runs here differ" not in written([first, alike], tmp_path / "y.html")
    board = many_runs.content([Member(first), Member(RunFolder(alike.path))])["leaderboard"]
    assert board.better["OP"] == 1


def test_runs_on_other_bases_or_data_are_no_seeds_of_each_other(tmp_path):
    """A recipe names them by a path, which may hold something else; the manifest says what was there. The
    same content elsewhere is the same."""
    first = make(tmp_path / "a")
    moved = make(tmp_path / "b", seed=2, model__path="moved/model")
    base, data = (make(tmp_path / name, lift=9.0, seed=3) for name in "cd")
    for folder, own in ((base, {"base": "1" * 64}), (data, {"data": {"A": "2" * 64}}), (first, {"data": {}})):
        write_json(folder.path / "manifest.json", folder.manifest | own)
    members = [Member(RunFolder(folder.path)) for folder in (first, moved, base, data)]
    groups = grouped(many_runs.opened(members))
    assert [[run.folder.path.name for run in group] for group in groups] == [["a", "b"], ["c"], ["d"]]


def test_runs_by_two_versions_of_a_plug_in_are_no_seeds_of_each_other(tmp_path):
    """The recipes are equal; where the file is does not matter."""
    made = [("a", "x.py", "1"), ("b", "elsewhere/x.py", "1"), ("c", "x.py", "2")]
    for seed, (name, file, digit) in enumerate(made):
        folder = make(tmp_path / name, seed=seed)
        origins = {"plugins": {"method codyra": {"file": file, "sha256": digit * 64}}}
        write_json(folder.path / "manifest.json", folder.manifest | origins)
    groups = grouped([many_runs.Run(RunFolder(tmp_path / name), {}, {}) for name, _, _ in made])
    assert [[run.folder.path.name for run in group] for group in groups] == [["a", "b"], ["c"]]


def test_an_unfinished_run_is_no_best_one(tmp_path):
    """Its OP is that of fewer tasks; also one that has learnt nothing yet is told."""
    whole, half, new = (make(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b", "c")))
    for folder, steps in ((half, 1), (new, 0)):
        kept = [row for row in read_jsonl(folder.path / "scores.jsonl") if row["step"] <= steps]
        write_jsonl(folder.path / "scores.jsonl", kept)
    found = many_runs.content([Member(whole), Member(half), Member(new)])
    assert f"Not finished: {half.path}, {new.path}." in found["facts"]
    assert any("differ in tasks learnt" in fact for fact in found["facts"])
    assert "OP" not in found["leaderboard"].better


def parsed(folders: list[RunFolder], out) -> dict[tuple[str, str], list[dict]]:
    """The rows of the CSV by table and column."""
    page.write(folders, out)
    found = {}
    with open(out, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault((row["table"], row["column"]), []).append(row)
    return found


def test_orders_are_groups_of_their_own_and_one_seed_twice_is_a_fault(tmp_path):
    first, other = make(tmp_path / "a"), make(tmp_path / "b", data__tasks=TASKS[::-1])
    assert [row["value"] for row in parsed([first, other], tmp_path / "x.csv")["runs", "group"]] == [
        "1 codyra",
        "2 codyra tasks " + ",".join(TASKS[::-1]),
    ]
    with pytest.raises(Fault, match="same recipe and seed 1234; give one of them"):
        page.write([first, make(tmp_path / "c")], tmp_path / "x.html")


def test_no_cell_of_a_csv_is_a_formula():
    evil = "=1+1"
    table = grid.Grid(evil, "", [evil, "-"], [(evil, [grid.word(evil), grid.Cell(-1.5, "-1.5")])])
    out = io.StringIO()
    grid.write_csv([table], out)
    quoted = "'" + evil
    assert list(csv.reader(out.getvalue().splitlines()))[1:] == [
        [quoted, quoted, quoted, quoted, *[""] * 5],
        [quoted, quoted, "'-", "-1.5", *[""] * 5],
    ]


def test_no_cell_of_a_csv_is_a_command_of_a_terminal():
    out = io.StringIO()
    grid.write_csv([grid.Grid("\x9b2J", "", ["a\u202eb"], [("\x1b[2J", [grid.word("\r=1+1")])])], out)
    assert list(csv.reader(out.getvalue().splitlines()))[1][:4] == [
        "\ufffd2J",
        "\ufffd[2J",
        "a\ufffdb",
        "'\ufffd=1+1",
    ]


def test_csv_and_markdown_parse_back(one, tmp_path):
    rows = parsed([one], tmp_path / "x.csv")
    for j, task in enumerate(TASKS):
        column = [20 + j, *(row[j] for row in MATRIX if row[j] is not None)]
        assert [float(row["value"]) for row in rows["scores", task]] == column
        assert [float(row["high"]) for row in rows["scores", task]] == [v + 3 for v in column]
    text = written([one], tmp_path / "x.md")
    assert "<script" not in text and "<x>" not in text
    lines = text.split("## scores")[1].split("##")[0].strip().splitlines()
    table = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("|")
    ]
    assert [html.unescape(name).replace("\\|", "|") for name in table[0]] == ["after", *TASKS]
    numbers = [
        [float(re.match(r"[*]*([\d.]+)", cell)[1]) if cell else None for cell in row[1:]] for row in table[2:]
    ]
    assert numbers == [[20, 21, 22], *([v if v is None else round(v, 1) for v in row] for row in MATRIX)]


def test_mistakes_are_one_sentence(one, many, tmp_path, capsys):
    for args, message in (
        (["nowhere"], "is not a run folder"),
        ([str(one.path), "--out", "x.htm"], "must end in .html"),
        ([str(one.path), "nowhere", "--out", "x.html"], "is not a run folder"),
        ([str(f.path) for f in many], "--out: several runs"),
    ):
        assert main_ends(["report", *args]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0, 12.7), (-3, 4.2), (2e-5, 1e-3), (7, 7), (0, 0), (99.7, 100)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    found = charts.ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7 and steps == pytest.approx(steps[0])
    assert re.fullmatch(r"[125]\.0+e.*", f"{steps[0]:.9e}")


def test_thinned_lines_keep_their_means():
    line = [(i, math.cos(i)) for i in range(1000)]
    thin = charts.thinned(line, 50)
    assert len(thin) == 50 and np.mean(thin, axis=0) == pytest.approx(np.mean(line, axis=0))
    assert charts.thinned(line[:7], 50) == line[:7] and charts.thinned([]) == []


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_is_readable_on_every_cell_in_both_schemes(one, tmp_path):
    """A cell's colour lies between paper and heat, so the least contrast is at one of the two."""
    schemes = re.findall(r":root \{[^}]*--paper[^}]*\}", written([one], tmp_path / "x.html"))
    assert len(schemes) == 2
    for scheme in schemes:
        colour = {name: luminance(value) for name, value in re.findall(r"--(\w+): (#\w{6})", scheme)}
        for text, ground, least in (
            ("ink", "paper", 7),
            ("ink", "heat", 4.5),
            ("muted", "paper", 4.5),
            ("blue", "paper", 3),
            ("orange", "paper", 3),
        ):
            dark, light = sorted((colour[text], colour[ground]))
            assert (light + 0.05) / (dark + 0.05) >= least, (text, ground)


def test_a_rank_map_of_several_ranks_has_them_in_its_cells():
    ranks = enumerate((4, 8))
    rows = [UpdateRow("A", f"layers.{i}.mlp.up_proj", rank, 3, 1.0, 1.0, None) for i, rank in ranks]
    (found,) = one_run._rank_maps(rows)
    assert found.note == "of 4 or 8" and [cells[0].text for _, cells in found.rows] == ["3/4", "3/8"]
