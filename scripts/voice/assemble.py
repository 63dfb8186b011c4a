"""Put the demo's model together: one folder, half precision, the memory inside.

    python -m voice.assemble START MIMI.safetensors OUT RUN [RUN ..]      (in scripts/)

START is the folder of `voice.model`, MIMI is of `voice.train_decoder`, RUN of `train --phase all`.
Of several runs of one line, or branches of it, the mean is taken (Izmailov et al. 2018, arXiv
1803.05407; Wortsman et al. 2022, arXiv 2203.05482).
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from moshi_ttt_mlx.surgery import CONFIG_NAME, WEIGHTS_NAME

from .model import codec_config

MEMORY = "memory"


def mean(files: Sequence[Path], out: Path) -> None:
    """The mean of weights files, in float16."""
    every = [mx.load(str(file)) for file in files]
    arrays = {
        name: (sum(one[name].astype(mx.float32) for one in every) / len(every)).astype(mx.float16)
        for name in every[0]
    }
    mx.save_safetensors(str(out), arrays, {"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("start", "mimi", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    (args.out / MEMORY).mkdir(parents=True, exist_ok=True)
    config = json.loads((args.start / "config.json").read_text())
    config["mimi_config"] = codec_config(args.mimi)
    config |= {"memory_path": MEMORY, "lm_gen_config": {"temp": 0.0, "temp_text": 0.0}}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(args.start / "tokenizer.model", args.out)
    shutil.copy(args.mimi, args.out / "mimi.safetensors")
    last = [run / "last" for run in args.runs]
    shutil.copy(last[-1] / CONFIG_NAME, args.out / MEMORY)
    mean([run / "model.safetensors" for run in last], args.out / "model.safetensors")
    mean([run / WEIGHTS_NAME for run in last], args.out / MEMORY / WEIGHTS_NAME)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
