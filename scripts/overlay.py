"""Let this environment see the packages of another below its own: `.venv-peers/bin/python scripts/overlay.py .venv`.

What is installed here wins; all else comes from there. An editable install there is seen too, which a plain path in a
.pth file would not give.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path


def main() -> int:
    """Write lower.pth beside this environment's packages."""
    lower = Path(sys.argv[1]).resolve()
    names = {"base": str(lower), "platbase": str(lower)}
    packages = sysconfig.get_path("purelib", vars=names)
    if not Path(packages).is_dir():
        print(f"there is no {packages}: make install first", file=sys.stderr)
        return 1
    own = Path(sysconfig.get_path("purelib"))
    (own / "lower.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
