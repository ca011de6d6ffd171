"""Build one chapter alone, quickly: python tools/preview_page.py foundations/online_softmax

Writes its notebook, executes it if it is stale, and builds a site of the front page, that chapter and the
references into `_build/preview`. Links to other chapters warn; everything else must be silent.
"""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from book_files import BOOK, ROOT


def main() -> int:
    if len(sys.argv) != 2 or not (BOOK / f"{sys.argv[1]}.md").exists():
        raise SystemExit("usage: make page NAME=<part>/<chapter>, a file under book/ without its suffix")
    source = f"book/{sys.argv[1]}.md"
    toc = ROOT / "_build" / "preview" / "_toc.yml"
    toc.parent.mkdir(parents=True, exist_ok=True)
    pages = [source, "book/notation.md", "book/appendix/references.md"]
    chapters = [{"file": page} for page in pages]
    toc.write_text(yaml.safe_dump({"format": "jb-book", "root": "book/index", "chapters": chapters}))
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    # figures stand alone, also where the build executes a cell itself
    static = os.environ | {"EFFATTN_LITE_STATIC": "1"}
    for command in (
        [sys.executable, "tools/write_tables.py", "--headers"],
        [sys.executable, "tools/write_notebooks.py", source],
        [sys.executable, "tools/execute_notebooks.py", source, "--workers=0"],
        [jupyter_book, "build", ".", "--toc", toc, "--path-output", toc.parent, "-n", "--keep-going"],
    ):
        if subprocess.run(command, cwd=ROOT, env=static, check=False).returncode:
            return 1
    print(f"\nthe page: {toc.parent}/_build/html/book/{sys.argv[1]}.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
