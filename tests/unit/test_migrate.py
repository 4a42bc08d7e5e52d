"""`lowbit migrate`: what becomes of old names, by whatever name a script has for them, and of everything else (nothing)."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import lowbit.compat
from lowbit.cli import FAILED, OK, main
from lowbit.compat.ignored import CompatWarning
from lowbit.errors import LowbitError
from lowbit.migrate.codemod import migrate
from lowbit.migrate.rules import ADDED, ANY, BRINGING, DRAFTING, FIGURES, NO_DEVICE, OF_OLD, RULES, SAYS_XPU, SEVERAL
from unit.checkpoint_cases import EVEN, make


def became(source: str, device: str | None = None) -> str:
    found = migrate(dedent(source), device)
    assert not found.left, found.left
    return found.source


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from neural_compressor.transformers import RtnConfig\n", "from lowbit import RtnConfig\n"),
        ("from bigdl.llm import optimize_model as pack\n", "from lowbit import optimize_model as pack\n"),
        (
            "from ipex_llm.transformers import AutoModel\nm = AutoModel.from_pretrained('x', load_in_4bit=True)\n",
            "from lowbit import AutoModel\nm = AutoModel.from_pretrained('x', load_in_4bit=True)\n",
        ),
        (
            "import ipex_llm\nm = ipex_llm.optimize_model(m, low_bit='nf4')\n",
            "import lowbit\nm = lowbit.optimize_model(m, low_bit='nf4')\n",
        ),
        (
            "from ipex_llm.transformers import AutoModel\nm = AutoModel.load_low_bit('x').eval().to('xpu')\n",
            "from lowbit import AutoModel\nm = AutoModel.load_low_bit('x').eval().to('xpu')\n",
        ),
        (
            "from ipex_llm import transformers\nm = transformers.AutoModel.load_low_bit('x')\n",
            "import lowbit\nm = lowbit.AutoModel.load_low_bit('x')\n",
        ),
        (
            "from bigdl.llm.transformers.qlora import get_peft_model, LoraConfig\n",
            "from peft import get_peft_model, LoraConfig\n",
        ),
        ("import torch, ipex_llm\ntorch.ones(1)\n", "import torch\ntorch.ones(1)\n"),
        ("# why\nimport intel_extension_for_pytorch as ipex\nimport torch\n", "# why\nimport torch\n"),
        (
            "from optimum.intel import OVModelForCausalLM\nm = OVModelForCausalLM.from_pretrained('x', export=True)\n",
            "from lowbit.openvino import OVModelForCausalLM\nm = OVModelForCausalLM.from_pretrained('x', export=True)\n",
        ),
        (
            "import nncf\nm.model = nncf.compress_weights(m.model, mode=nncf.CompressWeightsMode.INT4_SYM, ratio=0.8)\n",
            "import lowbit.openvino\n"
            "m.model = lowbit.openvino.compress_weights(m.model, mode=lowbit.openvino.CompressWeightsMode.INT4_SYM, ratio=0.8)\n",
        ),
        ("from optimum.onnxruntime import ORTModel\n", "from optimum.onnxruntime import ORTModel\n"),
        (
            "import intel_extension_for_pytorch as ipex\nif x:\n    ipex.set_logging_level(1)\n",
            "if x:\n    pass\n",
        ),
        (
            "from ipex_llm.transformers import AutoModel\nAutoModel.from_pretrained(p, optimize_model=False, lightweight_bmm=b)\n",
            "from lowbit import AutoModel\nAutoModel.from_pretrained(p)\n",
        ),
        (
            "import torch\nimport intel_extension_for_pytorch as ipex\n"
            "model = ipex.llm.optimize(model.eval(), dtype=torch.bfloat16, inplace=True)\n",
            "import lowbit\nimport torch\nmodel = lowbit.optimize_model(model.eval(), torch_dtype=torch.bfloat16, low_bit=None)\n",
        ),
        (
            "import intel_extension_for_pytorch as ipex\nimport torch\nm = ipex.llm.optimize(m)\n",
            "import lowbit\nimport torch\nm = lowbit.optimize_model(m.eval(), low_bit=None, torch_dtype=\"float32\")\n",
        ),
        ("from transformers import LlamaTokenizer\n", "from transformers import AutoTokenizer as LlamaTokenizer\n"),
        (
            "import transformers\nt = transformers.LlamaTokenizer.from_pretrained(p)\n",
            "import transformers\nt = transformers.AutoTokenizer.from_pretrained(p)\n",
        ),
        (
            "from transformers import TrainingArguments\n"
            "TrainingArguments('o', evaluation_strategy=s, warmup_ratio=0.1, optim='adamw_hf', save_safetensors=True, bf16=b)\n",
            "from transformers import TrainingArguments\n"
            'TrainingArguments(\'o\', eval_strategy=s, warmup_steps=0.1, optim="adamw_torch", bf16=b)\n',
        ),
        (
            "from transformers import TrainingArguments\nTrainingArguments('o', ddp_backend='ccl', report_to=None, optim=o)\n",
            "from transformers import TrainingArguments\nTrainingArguments('o', ddp_backend=None, report_to=\"none\", optim=o)\n",
        ),
        (
            "from transformers import TrainingArguments\nTrainingArguments('o', ddp_backend='gloo', report_to=['wandb'])\n",
            "from transformers import TrainingArguments\nTrainingArguments('o', ddp_backend='gloo', report_to=['wandb'])\n",
        ),
        (
            "from transformers import Trainer\nTrainer(m, tokenizer=t)\n",
            "from transformers import Trainer\nTrainer(m, processing_class=t)\n",
        ),
        ("t.apply_chat_template(c, return_tensors=r)\n", "t.apply_chat_template(c, return_tensors=r, return_dict=False)\n"),
        ("ids = t.apply_chat_template(c, tokenize=False)\n", "ids = t.apply_chat_template(c, tokenize=False)\n"),
        ("optimize_model = 1\nprint(optimize_model, 'xpu')  #  so\n", "optimize_model = 1\nprint(optimize_model, 'xpu')  #  so\n"),
    ],
)  # fmt: skip
def test_names_and_keywords(before: str, after: str) -> None:
    assert became(before) == after


def test_a_device_is_given_for_xpu() -> None:
    source = """\
    '''About "xpu".'''
    import torch
    m.to("xpu")
    x = torch.ones(1, device='xpu:0')
    torch.xpu.synchronize()
    scaler = torch.amp.GradScaler(enabled=True)
    print("on the xpu")
    """
    cpu = became(source, "cpu")
    assert 'm.to("cpu")' in cpu and "device='cpu'" in cpu and 'GradScaler(device="cpu", enabled=True)' in cpu
    assert "torch.xpu" not in cpu and '"on the xpu"' in cpu and 'About "xpu"' in cpu
    assert "torch.cuda.synchronize()" in became(source, "cuda")
    asked = migrate("import torch\nprint(torch.xpu.is_available())\n", "cpu")
    assert [note.name for note in asked.left] == ["torch.xpu.is_available"]


def test_where_a_model_goes_without_a_word() -> None:
    source = "from neural_compressor.transformers import AutoModel\nm = AutoModel.from_pretrained(p)\n"
    assert "from_pretrained(p)" in became(source, "cpu") and 'from_pretrained(p, device_map="cuda")' in became(
        source, "cuda"
    )
    assert [note.reason for note in migrate(source).dropped] == [NO_DEVICE]
    assert not migrate(source.replace("(p)", "(p, device_map='xpu')")).dropped


def test_what_has_no_name_of_ours_stays_marked_and_answered() -> None:
    source = dedent(
        '''\
        """What it does."""
        from __future__ import annotations

        import intel_extension_for_pytorch as ipex
        from ipex_llm.transformers import AutoModelForCausalLM, AutoModel
        from neural_compressor.transformers.quantization.utils import replace_linear

        # load
        model = AutoModelForCausalLM.from_pretrained(
            path,
            speculative=True,
        )
        other = AutoModel.from_pretrained(path)
        if True:
            model = ipex.unheard_of(model)
        '''
    )
    found = migrate(source)
    assert [(note.line, note.name) for note in found.left] == [
        (6, "neural_compressor.transformers.quantization.utils.replace_linear"),
        (9, "ipex_llm.transformers.AutoModelForCausalLM.from_pretrained"),
        (15, "intel_extension_for_pytorch.unheard_of"),
    ]
    lines = found.source.splitlines()
    assert lines[:4] == ['"""What it does."""', "from __future__ import annotations", "", "import lowbit.compat"]
    assert "from ipex_llm.transformers import AutoModelForCausalLM" in lines and "from lowbit import AutoModel" in lines
    assert "import intel_extension_for_pytorch as ipex" in lines
    place = lines.index("# load")
    assert lines[place + 1].startswith(
        "# lowbit: ipex_llm.transformers.AutoModelForCausalLM.from_pretrained stays: speculative=:"
    )
    assert lines[place + 2] == "model = AutoModelForCausalLM.from_pretrained("
    assert any(line.startswith("    # lowbit: intel_extension_for_pytorch.unheard_of stays") for line in lines)
    compile(found.source, "script", "exec")
    again = migrate(found.source)
    assert [note.name for note in again.left] == [note.name for note in found.left]


@pytest.mark.parametrize(
    "call",
    [
        "other = ipex.llm.optimize(model)",
        "original = model; model = ipex.llm.optimize(model)",
        "model = ipex.llm.optimize(model, None, torch.float)",
        "model = ipex.llm.optimize(model, quantization_config=q)",
        "f = ipex.llm.optimize",
    ],
)
def test_calls_of_which_only_a_part_is_understood_stay(call: str) -> None:
    source = f"import intel_extension_for_pytorch as ipex\n{call}\n"
    found = migrate(source)
    assert (
        len(found.left) == 1 and call in found.source and "import intel_extension_for_pytorch as ipex" in found.source
    )


def test_a_name_that_is_refused_says_so() -> None:
    found = migrate("import intel_extension_for_pytorch as ipex\nipex.deepspeed.init()\n")
    assert [note.reason for note in found.left] == ["lowbit refuses it: comes with lowbit on several devices"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import intel_extension_for_pytorch as ipex\nipex.optimise(model)\n", "did you mean optimize"),
        ("from neural_compressor import PostTrainingQuantConfig\n", "use lowbit.optimize_model"),
        ("from bigdl.llm.transformers import AutoModelForCasualLM\n", "did you mean AutoModelForCausalLM"),
    ],
)
def test_a_name_that_nobody_knows_is_not_said_to_be_answered(source: str, said: str) -> None:
    (note,) = migrate(source).left
    assert note.reason.startswith("lowbit has no ") and said in note.reason


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from transformers import AutoModel\nAutoModel.from_pretrained(p, load_in_8bit=True)\n", ["load_in_8bit="]),
        ("import transformers\ntransformers.AutoModel.from_pretrained(p, use_auth_token=t)\n", ["use_auth_token="]),
        ("from peft import prepare_model_for_int8_training\n", ["peft.prepare_model_for_int8_training"]),
        ("from transformers.deepspeed import HfDeepSpeedConfig\n", ["transformers.deepspeed.HfDeepSpeedConfig"]),
        ("from transformers import pipeline\nask = pipeline('summarization')\n", ["transformers.pipeline"]),
        (
            "model.generate(ids, forced_decoder_ids=[(1, 2)])\npast.to_legacy_cache()\n",
            ["forced_decoder_ids=", "to_legacy_cache"],
        ),
    ],
)
def test_what_older_transformers_had_is_marked_and_answered(source: str, names: list[str]) -> None:
    found = migrate(source)
    assert [note.name for note in found.left] == names and {note.reason for note in found.left} == {OF_OLD}
    assert "lowbit.compat.install()" in found.source and migrate(found.source).source == found.source


def test_words_of_today_are_not_marked() -> None:
    today = "from transformers import pipeline, AutoModel\npipeline('text-generation')\nAutoModel.from_pretrained(p, token=t)\n"
    assert migrate(today).source == today
    ours = "from ipex_llm.transformers import AutoModel\nAutoModel.from_pretrained(p, load_in_4bit=True)\n"
    assert not migrate(ours).left


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    from ipex_llm.transformers import AutoModel\nexcept ImportError:\n    from transformers import AutoModel\n",
        "if old:\n    from bigdl.llm.transformers import AutoModel\nelse:\n    from transformers import AutoModel\n",
    ],
)
def test_a_name_that_comes_from_here_or_there_stays(source: str) -> None:
    found = migrate(source + "model = AutoModel.from_pretrained(p, load_in_4bit=True, speculative=True)\n")
    assert [note.reason for note in found.left] == [SEVERAL]
    assert source.splitlines()[1] in found.source and "lowbit.compat.install()" in found.source


def test_a_traced_graph_keeps_the_maker_of_its_model() -> None:
    found = migrate("import intel_extension_for_pytorch as ipex\nm = ipex.llm.optimize(m)\nm.trace_graph(x)\n")
    assert [note.name for note in found.left] == ["intel_extension_for_pytorch.llm.optimize"]


def test_what_ipex_added_to_torch_is_marked_whatever_the_device() -> None:
    source = (
        "import torch\nimport intel_extension_for_pytorch\nmodel = torch.xpu.optimize(model)\n"
        "with torch.xpu.amp.autocast():\n    model(x)\n"
    )
    for device in (None, "cpu", "cuda"):
        found = migrate(source, device)
        assert [note.reason for note in found.left] == [ADDED, ADDED] and "torch.cuda.optimize" not in found.source


def test_what_says_xpu_in_other_ways_is_exchanged_where_it_is_sure() -> None:
    source = """\
    import torch
    model = model.xpu()
    if x.is_xpu:
        x.to(f'xpu:{i}').xpu(1, non_blocking=True)
        y.xpu(non_blocking=True).to(f"xpu:{next(it)}")
    print(f"xpu: {i}")
    """
    sure = ["model = model.cuda()", "if x.is_cuda:", "    x.to(f'cuda:{i}').cuda(1, non_blocking=True)"]
    found = migrate(dedent(source), "cuda")
    assert found.source.splitlines()[4:7] == sure and 'y.cuda(non_blocking=True).to(f"cuda:{next(it)}")' in found.source
    assert [note.name for note in found.left] == ['f"xpu:..."'] and 'print(f"xpu: {i}")' in found.source
    found = migrate(dedent(source), "cpu")
    assert 'model = model.to("cpu")' in found.source and "x.to('cpu').xpu(1, non_blocking=True)" in found.source
    assert 'y.to("cpu", non_blocking=True).to(f"xpu:{next(it)}")' in found.source
    assert [note.name for note in found.left] == [".is_xpu", ".xpu()", 'f"xpu:..."', 'f"xpu:..."']
    assert {note.reason for note in found.left} == {SAYS_XPU}
    assert migrate(dedent(source)).source == dedent(source)
    assert len(migrate(dedent(source), "cuda:1").left) == 7


def test_a_model_that_ipex_left_evaluating_evaluates() -> None:
    """What the calls of ipex.llm.optimize become puts the model to evaluating, as they did."""
    source = "import intel_extension_for_pytorch as ipex\nm = ipex.llm.optimize(m, inplace=True)\n"
    for first, now in (
        ("m", "m.eval()"), ("m.eval()", "m.eval()"), ("load(p)", "load(p).eval()"), ("a or b", "(a or b).eval()"),
        ("model=m", "model=m.eval()"),
    ):  # fmt: skip
        assert f"lowbit.optimize_model({now}, " in became(source.replace("(m,", f"({first},"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()).train()
    scope = {"m": model}
    exec(became(source), scope)
    assert scope["m"] is model and not model.training


def test_a_name_that_is_kept_once_is_kept_everywhere() -> None:
    source = "from ipex_llm.transformers import AutoModel\nAutoModel.from_pretrained(a)\nAutoModel.load_convert('int4', True, a)\n"
    found = migrate(source)
    assert "from ipex_llm.transformers import AutoModel\n" in found.source and "from lowbit" not in found.source


LOADED = """\
import torch
from ipex_llm.transformers import AutoModelForCausalLM

ids = torch.tensor([[5, 9, 11, 4, 8, 5, 9, 11, 4, 8, 5, 9, 11]])
model = AutoModelForCausalLM.from_pretrained(folder, load_in_low_bit="sym_int8")
"""
DENSE = """\
import torch, transformers
import intel_extension_for_pytorch as ipex

ids = torch.tensor([[5, 9, 11, 4, 8]])
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
model = ipex.llm.optimize(model, dtype=torch.bfloat16)
"""
INSTALL = "lowbit.compat.install()"  # for this process; the tests do it around the script alone
GREEDY = "max_new_tokens=6, do_sample=False"
SAME = [
    (LOADED + f"tokens = model.generate(ids, {GREEDY}, lookahead=3)\n", []),
    (
        LOADED + f"tokens = model.generate(**{{'input_ids': ids}}, {GREEDY}, lookahead=3, max_matching_ngram_size=4)\n",
        [],
    ),
    (LOADED + "tokens = model.lookup_generate(ids, num_output_tokens=3, do_sample=False)\n", []),
    (LOADED + f"n = 3\ntokens = model.generate(ids, {GREEDY}, lookahead=n)\n", ["lookahead goes with"]),
    (LOADED + f"tokens = model.generate(ids, {GREEDY}, lookahead=2, num_beams=2)\n", ["lookahead goes with"]),
    (LOADED + f"tokens = model.generate(ids.expand(2, -1), {GREEDY}, **dict(lookahead=2))\n", ["lookahead goes with"]),
    (LOADED + f"tokens = model.generate(ids, {GREEDY}, max_step_draft=4)\n", ["max_step_draft goes with"]),
    (
        LOADED
        + f"tokens = model.generate(ids, {GREEDY}, lookahead=3)\nseen = model.n_token_generated, model.n_drafted\n",
        ["n_token_generated goes with"],
    ),
    (
        LOADED.replace('"sym_int8"', '"sym_int8", speculative=True')
        + f"tokens = model.speculative_generate(ids, {GREEDY})\nseen = model.n_token_generated\n",
        ["speculative="],
    ),
    (
        LOADED + f"from ipex_llm.utils import BenchmarkWrapper\ntimed = BenchmarkWrapper(model)\n"
        f"tokens = timed.generate(ids, {GREEDY})\nseen = timed.first_cost > 0, timed.rest_cost_mean > 0\n",
        ["no name of its own"],
    ),
    (LOADED.replace("sym_int8", "q2_k") + "tokens = model(ids).logits\n", ["load_in_low_bit="]),
    (DENSE + f"tokens = model.generate(ids, {GREEDY})\n", []),
    (
        DENSE + f"tokens, times = model.generate(ids, {GREEDY}, token_latency=True)\nseen = len(times)\n",
        ["token_latency goes with"],
    ),
    (
        DENSE
        + f"model.config.token_latency = True\ntokens, times = model.generate(ids, {GREEDY})\nseen = len(times)\n",
        ["token_latency goes with"],
    ),
]


@pytest.mark.parametrize(("source", "left"), SAME, ids=range(len(SAME)))
def test_what_models_of_old_know_is_the_same_or_stays(source: str, left: list[str], folder: Path) -> None:
    found = migrate(source)
    assert len(found.left) == len(left)
    assert all(words in note.reason for words, note in zip(left, found.left, strict=True)), found.left
    assert ("lowbit.compat.install()" in found.source) == bool(left)
    assert left or not any(f"{top}" in found.source for top in ("ipex", "lookahead=", "lookup_generate"))
    before, after = {"folder": folder}, {"folder": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatWarning)
        with lowbit.compat.install(children=False):
            exec(compile(source, "old", "exec"), before)
        with lowbit.compat.install(children=False) if left else nullcontext():
            exec(compile(found.source.replace(INSTALL, ""), "new", "exec"), after)
    assert torch.equal(before["tokens"], after["tokens"]) and before.get("seen") == after.get("seen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("migrate") / "dense", **EVEN)


def test_the_words_are_those_of_the_faces() -> None:
    from lowbit.compat.faces.ipex_llm import old_model, optimize
    from lowbit.compat.faces.ipex_llm.transformers import model
    from lowbit.compat.faces.neural_compressor.transformers.models import modeling_auto

    assert FIGURES == old_model.FIGURES and DRAFTING == old_model.SPECULATIVE
    assert set(BRINGING) == set(model.EMBEDDINGS)
    for face, old in (
        (model, "ipex_llm.transformers.AutoModel"),
        (optimize, "ipex_llm.optimize_model"),
        (modeling_auto, "neural_compressor.transformers.AutoModel"),
    ):
        assert face.IDLE.items() <= RULES[old].drop.items()


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("AutoModel.from_pretrained(p, **more)", "only the running script knows"),
        ("load = AutoModel if x else None", "handed on"),
        ("AutoModel.from_pretrained(p, load_in_low_bit=args.low_bit)", "load_in_low_bit="),
        ("AutoModel.from_pretrained(p, load_in_low_bit='bf16')", "load_in_low_bit="),
        ("AutoModel.from_pretrained(p, quantization_config=c)", "bitsandbytes"),
        ("llm_patch(train=True); AutoModel.from_pretrained(p)", "llm_patch"),
    ],
)
def test_calls_that_only_the_running_script_can_read_stay(call: str, reason: str) -> None:
    source = f"from ipex_llm import llm_patch\nfrom ipex_llm.transformers import AutoModel\n{call}\n"
    found = migrate(source)
    assert call in found.source and "from ipex_llm.transformers import AutoModel\n" in found.source
    assert any("AutoModel" in note.name and reason in note.reason for note in found.left)
    again = migrate(found.source)
    assert again.source == found.source


def test_types_that_are_only_named_are_translated() -> None:
    source = (
        "from ipex_llm.transformers import AutoModel\ndef f(m: AutoModel) -> AutoModel: ...\nisinstance(m, AutoModel)\n"
    )
    assert became(source) == source.replace("ipex_llm.transformers", "lowbit")


def test_a_trainer_of_the_scripts_own_keeps_what_the_runner_does_for_it() -> None:
    found = migrate("from transformers import Trainer\nclass Own(Trainer): ...\nOwn(m, tokenizer=t)\n")
    assert [note.name for note in found.left] == ["transformers.Trainer"] and "Own(m, tokenizer=t)" in found.source


def test_one_name_is_one_object() -> None:
    source = (
        "from intel_extension_for_pytorch.llm import optimize\nm = optimize(m, dtype=d)\no = optimize(m, dtype=d)\n"
    )
    found = migrate(source)
    assert found.source.count("optimize(m, dtype=d)") == 2 and len(found.left) == 2


def test_what_guesses_is_listed_where_its_name_changed() -> None:
    found = migrate(SAME[0][0])
    assert "prompt_lookup_num_tokens=3, max_matching_ngram_size=2)" in found.source
    assert [note.name for note in found.dropped] == ["generate(lookahead=)"]


def test_every_rule_leads_to_something() -> None:
    for old, rule in RULES.items():
        home, _, name = rule.ours.rpartition(".")
        found = getattr(importlib.import_module(home), name)
        for member in rule.members if rule.members != ANY else ():
            assert hasattr(found, member), f"{old}: {rule.ours}.{member}"


def test_no_python_of_today() -> None:
    with pytest.raises(LowbitError, match="line 1"):
        migrate("print 'old'\n")


SCRIPT = "from bigdl.llm import optimize_model\r\nm = optimize_model(m, optimize_llm=False)"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "old.py"
    script.write_bytes(SCRIPT.encode())
    script.chmod(0o750)
    assert main(["migrate", str(script)]) == OK
    shown = capsys.readouterr()
    assert "-from bigdl.llm import optimize_model" in shown.out and "+from lowbit import optimize_model" in shown.out
    assert "dropped: ipex_llm.optimize_model(optimize_llm=)" in shown.err and "nothing is written" in shown.err
    assert script.read_bytes() == SCRIPT.encode()
    assert main(["migrate", str(script), "--write", "--json"]) == OK
    (result,) = json.loads(capsys.readouterr().out)
    assert result["changed"] and not result["left"] and [note["line"] for note in result["dropped"]] == [2]
    assert script.read_bytes() == b"from lowbit import optimize_model\r\nm = optimize_model(m)"
    assert script.stat().st_mode & 0o777 == 0o750 and list(tmp_path.iterdir()) == [script]
    assert main(["migrate", str(script)]) == OK
    assert "nothing to translate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        (None, [], "there is no script"),
        (b"\xff", [], "is no text in UTF-8"),
        (b"print 'x'\n", [], "old.py: this is no Python that runs today: line 1"),
        (b"", ["--device", "tpu"], "--device tpu is nothing that a script could run on here"),
    ],
)
def test_scripts_that_cannot_be_rewritten(
    content: bytes | None, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "old.py"
    if content is not None:
        script.write_bytes(content)
    assert main(["migrate", str(script), *words]) == FAILED
    assert said in capsys.readouterr().err


def test_without_libcst_the_line_that_installs_it(tmp_path: Path) -> None:
    script = tmp_path / "old.py"
    script.write_text("import ipex_llm\n")
    code = f"import sys; sys.modules['libcst'] = None\nfrom lowbit.cli import main\nsys.exit(main(['migrate', {str(script)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == FAILED and "pip install 'lowbit[migrate]'" in done.stderr
