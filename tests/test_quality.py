"""The rules of the quality study: which run is next, and what the plan holds."""

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "benchmarks" / "quality"


@pytest.fixture
def study(monkeypatch):
    """The module of the study; other folders of benchmarks have modules of the same names."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(FOLDER))
    import study

    yield study
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def ran(study, losses, start, seeds):
    """Records of a whole search, from losses by rate, or by rate and seed; the rest diverge."""
    found = []
    while (due := study.following(found, start, seeds)) is not None:
        exponent, seed = due
        loss = losses.get((exponent, seed), losses.get(exponent))
        new = all(r["exponent"] != exponent for r in found)
        others = [study.quality(r) for r in found if new and r["seed"] == 0]
        reached = None if loss is None else {"loss": loss}
        wanted = reached and loss <= min(others, default=math.inf)
        found.append(
            {
                "exponent": exponent,
                "seed": seed,
                "validation": reached,
                "test": reached if wanted else None,
            }
        )
        assert len(found) < 40
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(best=st.integers(-9, -1), start=st.integers(-9, -1), seeds=st.integers(1, 3))
def test_a_valley_is_searched_to_its_bottom_and_no_run_is_repeated(study, best, start, seeds):
    losses = {k: abs(k - best) + 1.0 for k in range(best - 12, best + 2)}
    found = ran(study, losses, start, seeds)
    swept = [r["exponent"] for r in found if r["seed"] == 0]
    assert len(swept) <= study.LONGEST
    keys = [(r["exponent"], r["seed"]) for r in found]
    assert len(keys) == len(set(keys))
    if abs(best - start) <= 3:
        assert study.chosen(found) == best
        assert {best - 1, best + 1} <= set(swept)
        assert sorted(study.scored(found, best)) == list(range(seeds))


def test_a_rate_at_which_one_seed_fails_gives_way_to_its_neighbour(study):
    losses = {-4: 0.5, -5: 0.53, -6: 0.56, (-4, 1): 0.69}
    found = ran(study, losses, -4, 2)
    assert study.chosen(found) == -5
    assert sorted(study.scored(found, -5)) == [0, 1]
    swept = {r["exponent"] for r in found if r["seed"] == 0}
    assert swept == {-3, -4, -5, -6}  # both neighbours of what was chosen in the end


def test_a_method_that_always_diverges_ends(study):
    found = ran(study, {}, -4, 3)
    assert len(found) <= study.LONGEST
    assert not study.scored(found, study.chosen(found))


def test_the_plan_names_every_method_once_and_results_belong_to_it(study):
    import plan

    labels = [method.label for method in plan.METHODS]
    assert len(set(labels)) == len(labels)
    assert len(set(plan.PLAN)) == len(plan.PLAN)
    written = (FOLDER / "plan.md").read_text(encoding="utf-8")
    for task, label in plan.PLAN:
        assert label in labels
        assert f"| {task} | {label} |" in written
    file = FOLDER / "results.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        record = json.loads(line)
        assert (record["task"], record["method"]) in plan.PLAN
