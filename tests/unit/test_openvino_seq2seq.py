"""Encoder-decoders as two graphs, one of them with its past inside: the same logits, the same generate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import LowbitError, RecipeError
from lowbit.models.past import PAST_NAMES, past_of
from lowbit.openvino import OVModelForSeq2SeqLM, OVModelForSpeechSeq2Seq, compress_weights
from lowbit.openvino.opening import EXACT
from lowbit.openvino.sites import low_bit_weights

# Following a module takes torch seconds.
pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
CLOSE = 5e-5  # weights of three times the size make the rounding of sums as much larger


def whisper() -> Any:
    own = {"num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 32}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SIZES, **TOKENS, **own))
    model.generation_config.suppress_tokens = model.generation_config.begin_suppress_tokens = None
    return model


def t5() -> Any:
    own = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**own, decoder_start_token_id=0))


def bart() -> Any:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES, max_position_embeddings=64))


def marian() -> Any:
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}
    return transformers.MarianMTModel(transformers.MarianConfig(**SIZES, **tokens, max_position_embeddings=64))


MODELS = {"whisper": whisper, "t5": t5, "bart": bart, "marian": marian}
WAYS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 20},
]


def saved(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # answers that differ from word to word
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    if name == "whisper":
        return {"input_features": torch.randn(2, 16, 100)}
    ids = torch.randint(3, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def kind(name: str) -> Any:
    return OVModelForSpeechSeq2Seq if name == "whisper" else OVModelForSeq2SeqLM


@pytest.mark.parametrize(
    "name", ["whisper", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "bart", "marian"))]
)
def test_logits_and_every_way_to_generate(name: str, tmp_path: Path) -> None:
    original = saved(name, tmp_path / "torch")
    model = kind(name).from_pretrained(tmp_path / "torch", export=True, ov_config=EXACT)
    given, begun = inputs(name), torch.randint(3, 96, (2, 5))
    with torch.no_grad():
        expected = original(**given, decoder_input_ids=begun).logits
    found = model(**given, decoder_input_ids=begun)
    assert float((found.logits - expected).norm() / expected.norm()) < CLOSE
    # In two steps, with the past of the first.
    for past in PAST_NAMES:
        first = model(**given, decoder_input_ids=begun[:, :3])
        rest = model(**given, decoder_input_ids=begun[:, 3:], **{past: past_of(first)})
        torch.testing.assert_close(rest.logits, found.logits[:, 3:], rtol=0, atol=1e-4)
    for way in WAYS:
        torch.manual_seed(5)
        wanted = original.generate(**given, max_new_tokens=12, **({"do_sample": False} | way))
        torch.manual_seed(5)
        assert torch.equal(model.generate(**given, max_new_tokens=12, **({"do_sample": False} | way)), wanted)
    model.save_pretrained(tmp_path / "graph")
    assert {"openvino_encoder_model.xml", "openvino_decoder_model.bin"} <= {
        f.name for f in (tmp_path / "graph").iterdir()
    }
    again = kind(name).from_pretrained(tmp_path / "graph", ov_config=EXACT)
    assert torch.equal(again(**given, decoder_input_ids=begun).logits, found.logits)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whisper in OpenVINO's form."""
    folder: Path = tmp_path_factory.mktemp("whisper")
    saved("whisper", folder / "torch")
    OVModelForSpeechSeq2Seq.from_pretrained(folder / "torch", export=True, compile=False).save_pretrained(
        folder / "graph"
    )
    return folder / "graph"


def test_both_graphs_have_the_bits(graph: Path) -> None:
    model = OVModelForSpeechSeq2Seq.from_pretrained(graph, load_in_8bit=True, compile=False)
    assert len(low_bit_weights(model.encoder.model)) == 8 and len(low_bit_weights(model.decoder.model)) >= 20
    dense = OVModelForSpeechSeq2Seq.from_pretrained(graph, ov_config=EXACT)
    given = inputs("whisper")
    begun = torch.randint(3, 96, (2, 5))
    before = dense(**given, decoder_input_ids=begun).logits
    dense.decoder.model = compress_weights(dense.decoder.model, mode="int4_sym", group_size=32)
    after = dense(**given, decoder_input_ids=begun).logits
    assert 1e-4 < float((after - before).norm() / before.norm()) < 0.5
    with pytest.raises(LowbitError, match=r"two graphs: exchange model.encoder.model and model.decoder.model"):
        dense.model = dense.decoder.model


def test_saved_over_itself(graph: Path, tmp_path: Path) -> None:
    """The folder is the one that both graphs are read from, and one of them was exchanged."""
    shutil.copytree(graph, tmp_path / "here")
    model = OVModelForSpeechSeq2Seq.from_pretrained(tmp_path / "here", ov_config=EXACT)
    given, begun = inputs("whisper"), torch.randint(3, 96, (2, 5))
    before = model(**given, decoder_input_ids=begun).logits
    model.save_pretrained(tmp_path / "here")
    assert torch.equal(model(**given, decoder_input_ids=begun).logits, before)
    model.decoder.model = compress_weights(model.decoder.model, mode="int8_sym")
    model.clear_requests()
    expected = model(**given, decoder_input_ids=begun).logits
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path / "here")
    again = OVModelForSpeechSeq2Seq.from_pretrained(tmp_path / "here", ov_config=EXACT)
    assert len(low_bit_weights(again.decoder.model)) >= 20 and not low_bit_weights(again.encoder.model)
    assert torch.equal(again(**given, decoder_input_ids=begun).logits, expected)


def test_what_it_cannot_do_is_one_sentence(graph: Path) -> None:
    with pytest.raises(RecipeError, match="calibration of an encoder-decoder goes through the torch model"):
        OVModelForSpeechSeq2Seq.from_pretrained(graph, quantization_config={"bits": 4, "dataset": "auto", "gptq": True})
    model = OVModelForSpeechSeq2Seq.from_pretrained(graph, compile=False)
    with pytest.raises(LowbitError, match="the encoder needs input_features"):
        model(decoder_input_ids=torch.ones(1, 1, dtype=torch.long))
    with pytest.raises(LowbitError, match="give decoder_input_ids, or call generate"):
        model(**inputs("whisper"))
    with pytest.raises(LowbitError, match="gives logits alone"):
        model(**inputs("whisper"), output_attentions=True)
