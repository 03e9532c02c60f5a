"""An adapter's README.md: what it is, what it needs, and the lines that load it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a card of PEFT's template says where nobody has written anything yet.
UNWRITTEN = "[More Information Needed]"
MARK = "<!-- polyrank writes this anew at each save; take this line out to keep a text of yours -->"
_FRONT = re.compile(r"---\n.*?\n---\n", re.S)
_LOADERS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def loading(
    config: Mapping[str, Any], plan: Mapping[str, Any], base: str, folder: str
) -> list[str]:
    """Return the lines of Python that put an adapter onto its base.

    Args:
        config: content of adapter_config.json.
        plan: content of polyrank_plan.json; its labels are those of a head that is saved whole.
        base: an expression for the path of the base.
        folder: one for the adapter's.
    """
    about = config.get("auto_mapping") or {}
    known = str(about.get("parent_library")).partition(".")[0] == "transformers"
    name = about.get("base_model_class") if known else _LOADERS.get(str(config.get("task_type")))
    first = ["import polyrank  # before PEFT reads the adapter"] if _own(config) else []
    first.append("from peft import PeftModel")
    # The base gets a classifier of that many rows, which the adapter then fills.
    size = len(plan.get("labels") or ())
    more = f", num_labels={size}, ignore_mismatched_sizes=True" if size else ""
    if name is None:
        what = about.get("base_model_class") or "model"
        made = f"base = ...  # the {what} that it was trained on"
        made += f", with {size} classes" if size else ""
    else:
        first.append(f"from transformers import {name}")
        made = f"base = {name}.from_pretrained({base}{more})"
    return [*first, made, f"model = PeftModel.from_pretrained(base, {folder})"]


def card(config: Mapping[str, Any], plan: Mapping[str, Any], folder: str | os.PathLike[str]) -> str:
    """Return the text of an adapter's README.md.

    A base that lies in a folder around the adapter's, as that of a run does, is named by its
    way from there, so that both can be moved together.

    Args:
        config: content of adapter_config.json.
        plan: content of polyrank_plan.json, {} if there is none.
        folder: where the adapter will lie.
    """
    name = str(config.get("base_model_name_or_path") or "")
    near = _near(name, Path(folder))
    told = f"`{near}`, seen from this folder" if near else f"`{name}`" if name else "not named"
    base = f'folder + "/{near}"' if near else repr(name or "BASE").replace("'", '"')
    method = config.get("method") if _own(config) else plan.get("method")
    lines = ["# An adapter of polyrank", ""]
    if method is not None:
        lines.append(f"- Method: `{method}`; `polyrank methods {method}` explains it.")
    if _own(config):
        given = config.get("options", {}).items()
        options = " ".join(f"{key}={value}" for key, value in given if value != "")
        lines.append(f"- Options: `{options}`")
    else:
        lines.append("- It is an ordinary LoRA, which PEFT loads without polyrank.")
    lines.append(f"- Base: {told}.")
    head = config.get("head") or {}
    if labels := plan.get("labels") or head.get("names"):
        lines.append(f"- Classes: {', '.join(map(str, labels))}.")
    *imports, made, model = loading(config, plan, base, "folder")
    code = [*imports, "", 'folder = "."  # this one', made, model]
    return "\n".join([*lines, "", "```python", *code, "```", "", MARK, ""])


def write_card(config: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Put our text in place of PEFT's template or an older one; what somebody has written stays.

    The front matter stays as well, which tells a hub the library, the base and the tags.
    """
    path = Path(folder) / "README.md"
    old = path.read_text(encoding="utf-8") if path.is_file() else UNWRITTEN
    if UNWRITTEN not in old and MARK not in old:
        return
    front = _FRONT.match(old)
    text = card(config, {}, folder)
    path.write_text(f"{front[0]}\n{text}" if front else text, encoding="utf-8")


def _own(config: Mapping[str, Any]) -> bool:
    return str(getattr(config.get("peft_type"), "value", config.get("peft_type"))) == "POLYRANK"


def _near(base: str, folder: Path) -> str:
    """Return the way to a base that lies in a folder around the adapter's, else ""."""
    if not base or not Path(base).is_dir():
        return ""
    path, here = Path(base).resolve(), folder.resolve()
    around = path.parent in here.parents and path.parent != Path(path.anchor)
    return Path(os.path.relpath(path, here)).as_posix() if around else ""
