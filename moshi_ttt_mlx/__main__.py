"""``python -m moshi_ttt_mlx``: the same program as the console script ``moshi-ttt-mlx``."""

import sys

from .cli import main

sys.exit(main())
