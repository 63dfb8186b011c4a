"""Write the small Moshi before its training: config, text tokenizer, random weights, the trained codec.

    python -m voice.model MIMI.safetensors OUT [--seed 0]      (in scripts/)

A folder as Kyutai's repositories have it, with `mimi_config` for the small codec, and beside it the
facts kept for testing: `moshi-ttt-mlx tokenize` and `train --phase base` take it from here.
"""

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import sentencepiece
from mlx.utils import tree_flatten
from moshi_mlx.models import Lm, LmConfig
from moshi_mlx.models.mimi import mimi_202407

from moshi_ttt_mlx.codec import mimi_config_to_dict

from .world import FACTS, HELD_OUT_FACTS, KEYS, SMALL_TALK, answered, asked, told

CODEBOOKS, BINS = 8, 256
WINDOW = 96  # frames: 7.7 s
LOUD = 0.4  # of a user's first codebook, beside 0.07 of all embeddings that start at random
LOUDER = 4  # the others, than the codec has them beside the first


def codec_config(mimi: Path) -> dict:
    """Kyutai's frame and window, smaller and cheaper in the rest; as `train_codec.mimi_config`.

    Args:
        mimi: its weights, with residual units or without.
    """
    units = any(".block." in name for name in mx.load(str(mimi)))
    config = mimi_config_to_dict(mimi_202407(CODEBOOKS))
    config["seanet"] |= {
        "nfilters": 16,
        "dimension": 192,
        "ratios": [4, 5, 6, 8],
        "nresidual_layers": int(units),
    }
    config["transformer"] |= {
        "d_model": 192,
        "num_heads": 6,
        "num_layers": 4,
        "dim_feedforward": 768,
    }
    return config | {"quantizer_bins": BINS, "quantizer_dim": 64}


def config(pieces: int, mimi: Path) -> dict:
    """`config.json`, as hibiki's repositories write it."""
    delays = [0] + [1] * (CODEBOOKS - 1)
    return {
        "model_type": "moshi",
        "card": BINS,
        "text_card": pieces,
        "existing_text_padding_id": 3,
        "n_q": 2 * CODEBOOKS,
        "dep_q": CODEBOOKS,
        "delays": [0, *delays, *delays],
        "dim": 192,
        "num_heads": 4,
        "num_layers": 4,
        "hidden_scale": 4.125,
        "causal": True,
        "layer_scale": None,
        "context": WINDOW,
        "max_period": 10000,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "cross_attention": False,
        "depformer_dim": 64,
        "depformer_num_heads": 2,
        "depformer_num_layers": 1,
        "depformer_dim_feedforward": 192,
        "depformer_multi_linear": True,
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "moshi_name": "model.safetensors",
        "mimi_name": "mimi.safetensors",
        "tokenizer_name": "tokenizer.model",
        "mimi_config": codec_config(mimi),
    }


def train_tokenizer(path: Path) -> int:
    """A SentencePiece model with Moshi's special ids, 0 ends padding, 3 is padding; its size."""
    said = [" ".join(answered(fact)) for fact in FACTS]
    text = said + [told(fact) for fact in FACTS]
    said += [exchange.moshi for exchange in SMALL_TALK]
    text += [asked(key) for key in KEYS] * 4
    text += [line for exchange in SMALL_TALK for line in exchange] * 8
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=200,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        # One token a word: what the memory has to bring back is one thing.
        user_defined_symbols=sorted(
            {"▁" + word for line in said for word in re.findall(r"\w+", line)}
        ),
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(str(path)).get_piece_size()


def codebooks(mimi: Path) -> list[tuple[mx.array, mx.array]]:
    """Of a codec's file, each codebook's vectors `[BINS, n]` and way to latents `[n, dim]`, float32."""
    tensors, books = mx.load(str(mimi)), []
    for number in range(CODEBOOKS):
        name, layer = ("first", 0) if number == 0 else ("rest", number - 1)
        place = f"quantizer.rvq_{name}."
        book = f"{place}vq.layers.{layer}._codebook"
        usage = mx.maximum(tensors[f"{book}.cluster_usage"].astype(mx.float32), 1e-5)
        vectors = tensors[f"{book}.embedding_sum"].astype(mx.float32) / usage[:, None]
        way = tensors[f"{place}output_proj.weight"][..., 0].T.astype(mx.float32)
        books.append((vectors, way))
    return books


def ears(mimi: Path, width: int) -> list[mx.array]:
    """How a user's codebooks are embedded at first: by the vectors that the codec has for their codes.

    What sounds alike looks alike then; from random vectors a model has to find that out, code by code,
    before it can hear a word (docs/voice.md).

    Args:
        mimi: its weights.
        width: of the model, as many as the codec's latents have.

    Returns:
        `CODEBOOKS` arrays, float32 `[BINS + 1, width]`; the last row, of no code, is 0.
    """
    tables = []
    for vectors, way in codebooks(mimi):
        latents = vectors @ way
        if latents.shape != (BINS, width):
            raise SystemExit(f"{mimi}: {latents.shape} latents, the model is {width} wide")
        tables.append(latents - mx.mean(latents, axis=0))
    loud = LOUD / mx.sqrt(mx.mean(mx.square(tables[0])))
    tables = [loud * tables[0], *(loud * LOUDER * table for table in tables[1:])]
    return [mx.concatenate([table, mx.zeros((1, width))]) for table in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("mimi", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    mx.random.seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    about = config(train_tokenizer(args.out / "tokenizer.model"), args.mimi)
    (args.out / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    lm = Lm(LmConfig.from_config_dict(about))
    arrays = dict(tree_flatten(lm.parameters()))
    for number, table in enumerate(ears(args.mimi, about["dim"])):
        arrays[f"audio_embs.{CODEBOOKS + number}.weight"] = table
    mx.save_safetensors(str(args.out / "model.safetensors"), arrays, {"format": "mlx"})
    shutil.copy(args.mimi, args.out / "mimi.safetensors")
    # For `train --kept`: as the model says them, and as it does in a hasty talk.
    kept = [
        line for key, value in HELD_OUT_FACTS for line in (f"{key} is {value}", f"{key} {value}")
    ]
    (args.out / "kept.txt").write_text("\n".join(kept) + "\n")
    size = sum(array.size for array in arrays.values())
    print(f"{args.out}: {size / 1e6:.2f} M parameters, {about['text_card']} pieces")


if __name__ == "__main__":
    main()
