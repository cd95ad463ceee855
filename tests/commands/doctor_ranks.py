"""One rank of `livt doctor --bench` as in a shell: doctor_ranks.py FAULT [ARGUMENT …]. Rank 1 breaks."""

from __future__ import annotations

import os
import sys
import time

from livt_scale import cli
from livt_scale.commands import doctor_bench
from livt_scale.errors import DataError
from livt_scale.parallel import probe

fault, sys.argv = sys.argv[1], ["livt", "doctor", "--bench", *sys.argv[2:]]
doctor_bench.GRACE_S = 3.0
if os.environ["RANK"] == "1":

    def fail(*_args, **_named):
        raise DataError("no shards on this node", remedy="copy them")

    if fault == "hangs":
        probe.pair_speeds = lambda *_args, **_named: time.sleep(120)
    elif fault == "dies":
        probe.all_reduce_speeds = lambda *_args, **_named: os._exit(9)
    elif fault == "fails":
        doctor_bench.socket.gethostname = lambda: "another"
        doctor_bench._decode = fail
cli.main()
