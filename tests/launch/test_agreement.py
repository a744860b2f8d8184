"""What processes must agree on where each computes it by itself, and rounding may differ."""

import pytest
from safetensors.torch import load_file

from codyra_llm.cli import main
from codyra_llm.config.recipe import load_recipe
from codyra_llm.experiment import run as runs
from codyra_llm.methods.parts.pricing import dropped
from codyra_llm.methods.sequential import codyra_drift


@pytest.mark.distributed
def test_processes_drop_the_parts_that_the_first_one_chose(recipe_files, tmp_path, forked):
    """Where parts cost and gain almost the same, another kind of CPU or GPU may order them otherwise; the
    second process here chooses what the first one keeps."""
    method = ["method=codyra_drift", "method.samples=8", "method.selection=ratio", "method.keep_drift=0.3"]
    recipe = recipe_files / "codyra.yaml"
    alone = runs.run(load_recipe(recipe, [f"output={tmp_path / 'alone'}", *method])).path

    def work(rank: int) -> int | None:
        def otherwise(priced, keep_drift):
            return {site: 1 - mask for site, mask in dropped(priced, keep_drift).items()}

        if rank:
            codyra_drift.dropped = otherwise
        return main(["run", str(recipe), f"output={tmp_path / 'run'}", *method])

    done = forked.ranks(work)
    assert done.returncode == 0, done.stderr
    for name in ("00-ONE", "01-THREE"):
        one, two = (load_file(path / "updates" / f"{name}.safetensors") for path in (alone, tmp_path / "run"))
        assert {key: t.shape for key, t in one.items()} == {key: t.shape for key, t in two.items()}
        kept = [len(t) for key, t in one.items() if key.endswith(".a")]
        assert 0 < sum(kept) < 16 * len(kept)
        for site in (key.removesuffix(".a") for key in one if key.endswith(".a")):
            delta, expected = (update[f"{site}.b"] @ update[f"{site}.a"] for update in (two, one))
            assert (delta - expected).norm() <= 0.05 * expected.norm(), site
