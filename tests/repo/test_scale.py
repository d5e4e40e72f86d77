"""The plan of docs/scale.md: the simulation agrees with its estimate, and the page with both."""

import math
from dataclasses import replace

import pytest
import scale
from paths import ROOT

SMALL = scale.Fleet(clips=1_000_000, workers=50, shard=100, away=60.0, start=10.0)


def test_without_trouble_it_is_arithmetic():
    fleet = replace(SMALL, preemptions=0.0, slow=0.0)
    done = scale.simulate(fleet)
    rounds = math.ceil(fleet.shards / fleet.workers)
    assert done["seconds"] == pytest.approx(fleet.start + rounds * fleet.shard * fleet.seconds)
    assert done["preemptions"] == done["lost_clips"] == 0 and done["shards"] == 10_000


@pytest.mark.parametrize("preemptions", [1.0, 100.0])
def test_the_estimate_is_that_of_the_simulation(preemptions):
    fleet = replace(SMALL, clips=10_000_000, preemptions=preemptions, slow=0.1)
    runs = [scale.simulate(fleet, seed) for seed in range(3)]
    guess = scale.estimate(fleet)
    assert sum(r["seconds"] for r in runs) / 3 == pytest.approx(guess["seconds"], rel=0.03)
    if preemptions > 1:
        assert sum(r["lost_clips"] for r in runs) / 3 == pytest.approx(guess["lost_clips"], rel=0.15)


def test_preemptions_of_large_shards_cost_more():
    lost = [scale.simulate(replace(SMALL, preemptions=100.0, shard=shard))["lost_clips"] for shard in (100, 1000, 4000)]
    assert lost[0] < lost[1] < lost[2]


@pytest.mark.parametrize("shard", [10_000, 100_000])
def test_the_page_states_what_the_simulation_gives(shard):
    page = (ROOT / "docs" / "scale.md").read_text()
    assert scale.row(scale.Fleet(shard=shard, preemptions=1.0)) in page
    assert f"{scale.sizes(scale.Fleet())['files']:,} files" in page
