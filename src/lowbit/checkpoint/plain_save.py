"""`model.save_pretrained` of a low-bit model: transformers' own writer, at work in a temporary folder.

transformers writes file after file into the folder that it is given, and a quantiser has no word in where: it hands over
tensors and sees no path. An interrupted save would leave new files beside old ones, which may even load. So a low-bit
model has a `save_pretrained` of its own, as it has a `generate`: it lets transformers write beside the target, adds the
report, takes along what else the target held (a tokenizer, a trainer's checkpoints) and exchanges the two folders.
transformers' class is left as it is; a call through the class, `LlamaForCausalLM.save_pretrained(model, folder)`, goes
past this one.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lowbit.checkpoint.folder import unwritten, update_folder
from lowbit.checkpoint.form import saved_form
from lowbit.checkpoint.layout import held_weights
from lowbit.checkpoint.loading_bar import weights_bar
from lowbit.checkpoint.save import (
    describe_to_engine,
    recipe_fields,
    refuse_to_replace_source,
    save_low_bit,
    source_folder,
    write_aside,
    write_report,
    write_untied,
)
from lowbit.errors import CheckpointError

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|lowbit(_(engine|activations)\.json)?")


def attach_saving(model: Any) -> None:
    """Give a low-bit model its two ways to be saved."""
    model.save_low_bit = partial(save_low_bit, model)
    model.save_pretrained = partial(save_pretrained, model)


def save_pretrained(model: Any, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
    """transformers' `save_pretrained`, which an interruption leaves undone as a whole."""
    own = type(model).save_pretrained
    if not held_weights(model) or not is_main_process or options.get("distributed_checkpoint"):
        own(model, save_directory, is_main_process=is_main_process, **options)
        return
    target = Path(save_directory).expanduser()
    refuse_to_replace_source(target, source_folder(model))
    if options.get("push_to_hub"):
        options.setdefault("repo_id", target.name)
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    with update_folder(target, outdated=lambda name: not adapters_only and bool(_WEIGHTS.fullmatch(name))) as temporary:
        try:
            _write(model, temporary, adapters_only, options)
        except SafetensorError as error:
            raise CheckpointError(unwritten(target, error)) from error


def _write(model: Any, folder: Path, adapters_only: bool, options: dict[str, Any]) -> None:
    form = saved_form(model, recipe_fields(model))
    tied = getattr(model.config, "tie_word_embeddings", None)
    try:
        with weights_bar("saving"):
            type(model).save_pretrained(model, folder, **options)
    finally:
        if form.untie:  # said of the folder, not of the model
            model.config.tie_word_embeddings = tied
    if adapters_only:
        return
    write_aside(model, form, folder)
    if form.untie:
        write_untied(folder)
    write_report(model, folder)
    describe_to_engine(folder)
