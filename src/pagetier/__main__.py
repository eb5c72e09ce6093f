"""``python -m pagetier`` is the command ``pagetier``."""

from pagetier.handler.cli import main

raise SystemExit(main())
