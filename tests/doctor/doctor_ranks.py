"""One rank of `livt doctor --bench` as in a shell: doctor_ranks.py FAULT [ARGUMENT …]. Rank 1 breaks."""

from __future__ import annotations

import os
import sys
import time

import simplejpeg

from livt_scale.cli import main
from livt_scale.doctor import bench, network
from livt_scale.util.errors import DataError

fault, sys.argv = sys.argv[1], ["livt", "doctor", "--bench", *sys.argv[2:]]
bench.GRACE_S = 3.0
if os.environ["RANK"] == "1":

    def fail(*_args, **_named):
        raise DataError("no shards on this node", remedy="copy them")

    if fault == "hangs":
        network.pair_speeds = lambda *_args, **_named: time.sleep(120)
    elif fault == "dies":
        network.all_reduce_speeds = lambda *_args, **_named: os._exit(9)
    elif fault == "fails":
        bench.socket.gethostname = lambda: "another"
        simplejpeg.decode_jpeg = fail
main.main()
