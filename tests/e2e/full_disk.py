"""`livt` on a disk that is full for some checkpoints: `python -m tests.e2e.full_disk train RECIPE …`.

TEST_DISK_IS_FULL is a Python expression of `step`, such as "step > 6".
"""

from __future__ import annotations

import errno
import os
import re

from livt_scale.checkpoint import io
from livt_scale.cli import main

write = io.HashedFile.write


def on_a_full_disk(self, data):
    step = int(re.search(r"step-(\d+)", str(self.path))[1])
    if eval(os.environ["TEST_DISK_IS_FULL"], {"step": step}):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error
    return write(self, data)


if __name__ == "__main__":
    io.HashedFile.write = on_a_full_disk
    main.main()
