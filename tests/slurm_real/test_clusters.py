"""Chains on clusters other than the one of most tests: what depends on their settings (`descriptions.py`)."""

import random

import pytest

from livt_scale.util.host_list import expand
from tests.slurm_real.chains import Chain
from tests.slurm_real.descriptions import UNEVEN
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture
def uneven(clusters):
    running = clusters(UNEVEN)
    yield running
    running.settle()


def test_a_node_that_is_lost_beside_the_batch_node_leaves_the_rest_to_the_next_segment(uneven, reference, tmp_path):
    chain = Chain(uneven, tmp_path / "a run", slurm__pretrain__segments=2)
    chain.lay("pace", "1 1")
    chain.submit()
    chain.await_steps(random.randrange(1, 8))
    job = uneven.show(chain.jobs["pretrain-1"])
    (other,) = set(expand(job["NodeList"])) - {job["BatchHost"]}
    uneven.kill(other, noticed_s=3)
    states = chain.ended()
    assert states.pop("pretrain-1") == "NODE_FAIL"
    assert set(states.values()) == {"COMPLETED"}, chain.tell()
    assert "a node of this job is down" in chain.log("pretrain-1")
    assert_same_run(chain.run_dir, reference)
