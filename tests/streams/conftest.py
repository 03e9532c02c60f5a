"""Small data files of every format, as tests of streams write them: the fixture `files`."""

import csv
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

TOPICS = ("sport", "world")


def texts(count, labels=TOPICS, mark="t"):
    """Rows {"text", "label"}, labels in turn."""
    return [{"text": f"{mark}{i}", "label": labels[i % len(labels)]} for i in range(count)]


def jsonl(path, rows):
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path, rows, mark=","):
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path, rows, **features):
    """Write rows as Parquet, as `datasets` does, with label names where they are given."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = pa.Table.from_pylist(rows)
    if features:
        plain = datasets.Features.from_arrow_schema(columns.schema)
        schema = datasets.Features({**plain, **features}).arrow_schema
        columns = columns.cast(pa.schema(columns.schema).with_metadata(schema.metadata))
        columns = columns.replace_schema_metadata(schema.metadata)
    pq.write_table(columns, path)
    return path


def png(seed, size=(4, 3)):
    """The content of a PNG file of coloured noise, width 4 and height 3."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue(), pixels


def photos(folder, classes=("cat", "dog"), each=3):
    """Write a folder of images with one folder a class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            (folder / name / f"{i}.png").write_bytes(png(10 * number + i)[0])
    return folder


def definition(text, name="tasks.yaml"):
    """Write a stream's file here; `text` is YAML, or what becomes YAML."""
    path = Path(name)
    text = text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def files():
    """The functions of this file."""
    return SimpleNamespace(
        TOPICS=TOPICS,
        definition=definition,
        jsonl=jsonl,
        parquet=parquet,
        photos=photos,
        png=png,
        table=table,
        texts=texts,
    )
