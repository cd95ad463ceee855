"""A study as arrays on a real Slurm: what shares a pretraining waits for it; the same command again ends it."""

import json

import pytest
import yaml

from tests.slurm_real.chains import Chain
from tests.slurm_real.cluster import wait_for
from tests.whole_runs import Livt

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


def test_two_submissions_bring_a_study_to_its_end(cluster, tmp_path):
    chain = Chain(cluster, tmp_path / "study")
    sets = {name: str(value) if name == "slurm.python" else value for name, value in chain.sets.items()}
    sets |= {"slurm.nodes": 1, "stages.*.epochs": 1}
    del sets["run_dir"], sets["stages.pretrain.epochs"]
    study = {
        "name": "tiny", "recipe": str(Livt(tmp_path).recipe), "axes": {"loss": ["bal_bce", "ce"], "seed": [0]},
        "sets": sets,
    }  # fmt: skip
    (chain.folder / "study.yaml").write_text(yaml.safe_dump(study))

    def submitted():
        return json.loads(chain.livt("study", "submit", "study.yaml", "--slurm", "--jobs=2", "--json").stdout)

    def idle():
        return not cluster.run("squeue", "--noheader").stdout.strip()

    first = submitted()
    assert (first["submitted"], first["waits"]) == (["bal_bce"], ["ce"])
    assert submitted()["joined"], "what is in the queue is not submitted again"
    wait_for(idle, chain.tell, seconds=500)
    second = submitted()
    assert (second["submitted"], second["waits"], second["done"]) == (["ce"], [], ["bal_bce"])
    wait_for(idle, chain.tell, seconds=500)
    told = json.loads(chain.livt("study", "collect", "study.yaml", "--json").stdout)
    one, other = told["runs"]
    assert one["state"] == other["state"] == "done", told["runs"]
    assert one["measures"]["reconstruction_loss"] == other["measures"]["reconstruction_loss"]
    assert submitted()["done"] == ["bal_bce", "ce"]
