"""The dense model as a teacher that need not stay: what it says of the training windows, kept on disk.

Some windows at a time go through the stream, one decoder block in memory. Of each position's predictions the largest
are kept, see `losses.py`; at 64 tokens a position that is 512 bytes, where all of them would be 200 kB.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.checkpoint import read_tensors, write_tensors
from llmcompress.stream import StreamedModel, stream_blocks
from llmcompress.training.losses import Taught, keep_largest
from llmcompress.training.step import Train

CHUNK = 128  # windows per walk over the blocks


class Lessons:
    """What the teacher said of windows [n, length] int64; folder: where it is kept."""

    def __init__(self, options: Train, folder: Path) -> None:
        self.options = options
        self.folder = folder

    def write(self, teacher: StreamedModel, windows: Tensor, rows: list[int], tell: Callable[[int, int], None]) -> None:
        """Let the teacher read those windows that will be learned from; what an earlier run has finished stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            if not all(self._file(row).exists() for row in part):
                self._write_part(teacher, part, windows[part])
            tell(min(start + CHUNK, len(rows)), len(rows))

    def read(self, rows: Tensor, device: torch.device) -> Taught:
        """Of some windows [n] int64."""
        found = [read_tensors(self._file(int(row))) for row in rows]
        parts = {name: torch.stack([one[name] for one in found]).to(device) for name in found[0]}
        return Taught(parts["tokens"].long(), parts["log_probs"], parts.get("hidden"))

    def _write_part(self, teacher: StreamedModel, rows: list[int], windows: Tensor) -> None:
        hidden = teacher.embed(windows)
        for _ in stream_blocks(teacher, hidden):
            pass
        with teacher.head() as logits:
            for number, row in zip(rows, hidden, strict=True):
                said = logits(row[None].to(teacher.device))[0]
                tokens, log_probs = keep_largest(said, self.options.top_k, self.options.temperature)
                kept = {"tokens": tokens.to(torch.int32), "log_probs": log_probs}
                if "hidden" in self.options.loss:
                    kept["hidden"] = row
                write_tensors(self._file(number), kept)

    def _file(self, window: int) -> Path:
        return self.folder / f"{window:06d}.safetensors"
