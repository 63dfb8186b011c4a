"""Put the demo's model together: one folder, half precision, the memory inside.

    python -m voice.assemble START BASE.safetensors ADAPTER MIMI.safetensors OUT      (in scripts/)

START is the folder of `voice.model`; BASE and ADAPTER come from `train`, MIMI from `voice.train_codec`.
"""

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx

from moshi_ttt_mlx.surgery import CONFIG_NAME, WEIGHTS_NAME

from .model import codec_config

MEMORY = "memory"


def halved(source: Path, out: Path) -> None:
    """A weights file in float16."""
    arrays = {name: array.astype(mx.float16) for name, array in mx.load(str(source)).items()}
    mx.save_safetensors(str(out), arrays, {"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("start", "base", "adapter", "mimi", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    (args.out / MEMORY).mkdir(parents=True, exist_ok=True)
    config = json.loads((args.start / "config.json").read_text())
    config["mimi_config"] = codec_config(args.mimi)
    config |= {"memory_path": MEMORY, "lm_gen_config": {"temp": 0.0, "temp_text": 0.0}}
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(args.start / "tokenizer.model", args.out)
    shutil.copy(args.mimi, args.out / "mimi.safetensors")
    shutil.copy(args.adapter / CONFIG_NAME, args.out / MEMORY)
    halved(args.base, args.out / "model.safetensors")
    halved(args.adapter / WEIGHTS_NAME, args.out / MEMORY / WEIGHTS_NAME)
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
