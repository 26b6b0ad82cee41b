"""`python -m hf_ssl_or` is `hf-ssl-or`."""

from __future__ import annotations

import sys

from hf_ssl_or.cli import main

if __name__ == "__main__":
    sys.exit(main())
