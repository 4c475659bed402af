"""``python -m lortalib``: the command line."""

from .cli import main

raise SystemExit(main())
