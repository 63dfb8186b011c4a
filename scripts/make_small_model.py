"""Write the model of the tests: the whole machinery at tiny size, with random weights.

    python scripts/make_small_model.py [OUT] [--seed 0]

Four files in the formats of Kyutai's repositories: `config.json`, `model.safetensors`, a small Mimi in
the codec's PyTorch layout and a SentencePiece text tokenizer. Nothing is trained: what this model says
means nothing.
"""

import argparse
import io
import itertools
import json
from pathlib import Path

import mlx.core as mx
import sentencepiece
from make_mimi_checkpoint import write as write_mimi
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig

from moshi_ttt_mlx.codec import mimi_config_to_dict, small_mimi

SMALL = Path(__file__).resolve().parent.parent / "tests" / "models" / "small"
CODEBOOKS = 8

THINGS = ["name", "colour", "number", "town", "sister", "brother", "garden", "friend", "house"]
VALUES = ["Anna", "Peter", "green", "seven", "London", "Paris", "eleven", "yellow", "Maria", "blue"]
TEMPLATES = [
    "Remember, my {a} is {b}.",
    "What is my {a}? Your {a} is {b}.",
    "Hello, how are you today? I am well, thank you, and the {a} is {b}.",
    "I would like to talk about the {a} and then about {b}.",
    "Could you say that again, please? Of course: {b} was the {a}.",
]


def train_tokenizer(path: Path, pieces: int = 256) -> int:
    """A SentencePiece model with Moshi's special ids: 0 ends padding, 3 is padding."""
    text = [t.format(a=a, b=b) for t, a, b in itertools.product(TEMPLATES, THINGS, VALUES)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=pieces,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(str(path)).get_piece_size()


def small_config(pieces: int) -> dict:
    """`config.json` as hibiki's repositories write it, plus `mimi_config` for the small codec."""
    delays = [0] + [1] * (CODEBOOKS - 1)
    return {
        "model_type": "moshi",
        "card": small_mimi(CODEBOOKS).quantizer_bins,
        "text_card": pieces,
        "n_q": 2 * CODEBOOKS,
        "dep_q": CODEBOOKS,
        "delays": [0, *delays, *delays],
        "dim": 64,
        "num_heads": 4,
        "num_layers": 4,
        "causal": True,
        "layer_scale": None,
        "context": 100,
        "max_period": 10000,
        "positional_embedding": "rope",
        "depformer_dim": 32,
        "depformer_num_heads": 2,
        "depformer_num_layers": 2,
        "depformer_dim_feedforward": 128,
        "depformer_pos_emb": "none",
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "tokenizer_name": "tokenizer.model",
        "mimi_config": mimi_config_to_dict(small_mimi(CODEBOOKS)),
    }


def write(folder: Path, seed: int) -> None:
    """All four files into one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = small_config(train_tokenizer(folder / "tokenizer.model"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mx.random.seed(seed)
    lm = Lm(LmConfig.from_config_dict(config))
    weights = {name: array.astype(mx.float16) for name, array in tree_flatten(lm.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_mimi(folder / "mimi.safetensors", "small", seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=SMALL)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    write(args.out, args.seed)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
