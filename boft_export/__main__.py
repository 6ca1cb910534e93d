"""``python -m boft_export``."""

from boft_export.cli.main import main

main()
