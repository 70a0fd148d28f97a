"""Prepared rows become prompts that are whole, measured and stable."""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dapo.config.data import DataConfig, FolderData, SyntheticData
from dapo.data.dataset import PromptSet, load_prompts
from dapo.data.prepare import prepare, prepared_schema
from dapo.data.processor import PromptProcessor
from dapo.errors import DataError
from tests.data.folders import image_bytes
from tests.data.rows import Rows, as_parquet, hub_files, write_files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    source = write_files(root / "source", hub_files())
    return prepare(DataConfig(source=FolderData(path=str(source)), instruction="Think."), root / "cache")


def load(parquet: Path, processor: PromptProcessor, **settings: Any) -> PromptSet:
    options: dict[str, Any] = {"instruction": "Think.", "limit": 1024, "too_long": "drop"}
    return load_prompts(parquet, processor, **(options | settings))


def prepared_from(tmp_path: Path, rows: Rows) -> Path:
    files = {"train.parquet": as_parquet(rows), "test.parquet": as_parquet(rows)}
    source = FolderData(path=str(write_files(tmp_path / "source", files)))
    return prepare(DataConfig(source=source), tmp_path / "cache") / "train.parquet"


def sized(*sides: int) -> Rows:
    """One row per image size: the larger the image the longer the prompt."""
    return [
        {"images": [{"bytes": image_bytes(side, side), "path": None}], "problem": "<image>Find x.", "answer": "1"}
        for side in sides
    ]


def test_prompts_carry_everything_the_trainer_and_the_grader_need(prepared: Path, processor: PromptProcessor) -> None:
    found = load(prepared / "train.parquet", processor)
    prompt = found.prompts[3]
    expected = processor.encode("<image>Find x if y = 3.", [image_bytes(43, 50, number=3)], "Think.")
    assert (prompt.id, prompt.answer, prompt.question) == ("train/3", "9", "Find x if y = 3.")
    assert (prompt.token_ids, prompt.image_grids) == expected
    assert prompt.images == (image_bytes(43, 50, number=3),)
    assert prompt.data_source == "source"
    assert [p.id for p in found.prompts] == [f"train/{i}" for i in range(20)]
    assert found.dropped == ()


def test_too_long_prompts_are_dropped_counted_and_never_cut(
    tmp_path: Path, processor: PromptProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(prepared_from(tmp_path, sized(64, 256, 64, 192)), processor, limit=60)
    # An image of 64 pixels is 2 x 2 features, of 192 pixels 6 x 6, of 256 pixels 8 x 8.
    text = len(found.prompts[0].token_ids) - 4
    assert [p.id for p in found.prompts] == ["train/0", "train/2"]
    assert [(d.id, d.tokens) for d in found.dropped] == [("train/1", text + 64), ("train/3", text + 36)]
    assert "2 of 4 prompts are longer than data.max_prompt_tokens=60" in caplog.text
    assert f"train/1 ({text + 64} tokens), train/3 ({text + 36} tokens)" in caplog.text


def test_prompt_of_exactly_the_limit_is_kept(tmp_path: Path, processor: PromptProcessor) -> None:
    parquet = prepared_from(tmp_path, sized(64))
    length = len(load(parquet, processor).prompts[0].token_ids)
    assert len(load(parquet, processor, limit=length).prompts) == 1
    assert len(load(parquet, processor, limit=length - 1).prompts) == 0


def test_refusal_names_the_prompts_and_their_lengths(tmp_path: Path, processor: PromptProcessor) -> None:
    parquet = prepared_from(tmp_path, sized(64, 256))
    with pytest.raises(DataError, match=r"1 of 2 prompts .*_tokens=60: train/1 \(\d+ tokens\); raise the limit"):
        load(parquet, processor, limit=60, too_long="refuse")


def test_most_prompts_are_the_first_that_fit(tmp_path: Path, processor: PromptProcessor) -> None:
    parquet = prepared_from(tmp_path, sized(256, 64, 64, 64))
    assert [p.id for p in load(parquet, processor, limit=60, max_prompts=2).prompts] == ["train/1", "train/2"]


def test_ids_do_not_shift_when_a_row_is_quarantined(tmp_path: Path, processor: PromptProcessor) -> None:
    rows = sized(64, 64, 64)
    rows[1]["answer"] = None
    files = {"train.parquet": as_parquet(rows), "test.parquet": as_parquet(rows)}
    source = FolderData(path=str(write_files(tmp_path / "source", files)))
    folder = prepare(DataConfig(source=source, max_broken_share=0.5), tmp_path / "cache")
    assert [p.id for p in load(folder / "train.parquet", processor).prompts] == ["train/0", "train/2"]


def test_row_that_does_not_suit_the_model_is_named(tmp_path: Path, text_folder: Path) -> None:
    parquet = prepared_from(tmp_path, sized(64))
    with pytest.raises(DataError, match=r"train/0: the question .* is text-only"):
        load(parquet, PromptProcessor(text_folder))


def test_file_that_was_not_prepared_is_refused(tmp_path: Path, processor: PromptProcessor) -> None:
    raw = write_files(tmp_path, {"raw.parquet": as_parquet(sized(64)), "junk.parquet": b"junk"})
    with pytest.raises(DataError, match="it is not a prepared file"):
        load(raw / "raw.parquet", processor)
    with pytest.raises(DataError, match=r"junk\.parquet cannot be read"):
        load(raw / "junk.parquet", processor)
    with pytest.raises(DataError, match=r"gone\.parquet cannot be read"):
        load(raw / "gone.parquet", processor)


def test_empty_split_has_no_prompts(tmp_path: Path, processor: PromptProcessor) -> None:
    pq.write_table(pa.Table.from_pylist([], prepared_schema()), tmp_path / "empty.parquet")
    assert load(tmp_path / "empty.parquet", processor) == PromptSet((), ())


def test_tags_of_synthetic_rows_reach_the_prompts(tmp_path: Path, processor: PromptProcessor) -> None:
    folder = prepare(DataConfig(source=SyntheticData(train=5, validation=1, test=1)), tmp_path)
    assert all(
        any(tag.startswith("figure:") for tag in p.tags) for p in load(folder / "train.parquet", processor).prompts
    )


def test_four_thousand_small_prompts_are_ready_in_five_seconds(tmp_path: Path, processor: PromptProcessor) -> None:
    folder = prepare(DataConfig(source=SyntheticData(train=4096, validation=1, test=1)), tmp_path)
    started = time.process_time()
    found = load(folder / "train.parquet", processor)
    assert len(found.prompts) == 4096
    assert time.process_time() - started < 5
