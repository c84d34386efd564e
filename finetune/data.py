"""An endless stream of training sequences whose place is a few integers, so that a resume is exact.

The one idea: nothing is buffered that cannot be read again. The place is (epoch, first row of the
shuffle block, document in the block, token in the document); a resume opens the file there,
shuffles the block as before, makes the tokens of one document again and goes on. What packing left
over is the token offset, not a list of tokens, so the state does not grow with the documents.
Documents are shuffled in blocks because the buffer of a streaming shuffle would be lost with a
stop.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ringspan.finetune.documents import (
    ON_BAD_LINE,
    Row,
    documents,
    no_documents,
    read_rows,
    usable,
)
from ringspan.finetune.files import Paths, find_files, one_of
from ringspan.finetune.packing import Counts, Document, Sequence, lay
from ringspan.parallel.faults import Fault

__all__ = ["Counts", "Document", "Sequence", "SequenceStream", "documents", "encode_document"]

OVERLONG = ("split", "drop", "truncate")


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """Return a document's tokens as trained on: with EOS, and with BOS if the tokenizer adds it."""
    tokens = tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if tokens and end is not None and tokens[-1] != end:
        tokens.append(end)
    return tokens


class SequenceStream(Iterator[Sequence]):
    """Sequences of seq_length tokens, epoch after epoch; a pure function of arguments and files.

    Under packing the next document begins where the last one ended (next-fit). overlong says what
    becomes of a document that does not fit: "split" goes on with it in the next sequence, so
    nothing is padded; "drop" and "truncate" concern documents longer than seq_length, and any other
    that does not fit into the rest waits for the next sequence. Without packing a sequence holds
    one document, or one piece of it.

    Raises:
        Fault: from the constructor (paths, values) and from next() (broken lines, no document to
            use).
    """

    def __init__(
        self,
        paths: Paths,
        tokenizer: Any,
        *,
        seq_length: int,
        root: str | Path | None = None,
        format: str = "auto",
        text_field: str = "text",
        packing: bool = True,
        overlong: str = "split",
        on_bad_line: str = "stop",
        shuffle_block: int = 0,
        seed: int = 0,
        made_by: str | None = None,
    ) -> None:
        one_of("overlong", overlong, OVERLONG)
        one_of("on_bad_line", on_bad_line, ON_BAD_LINE)
        if seq_length < 1 or shuffle_block < 0:
            raise Fault(f"seq_length is {seq_length} and shuffle_block {shuffle_block}; at least 1 and 0 are needed")
        self.counts = Counts()
        self.epoch = 0
        self._files = find_files(paths, root=root, format=format, made_by=made_by)
        self._tokenizer = tokenizer
        self._seq_length, self._packing, self._overlong = seq_length, packing, overlong
        self._text_field, self._on_bad_line = text_field, on_bad_line
        self._shuffle_block, self._seed = shuffle_block, seed
        pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad_id: int = next(pad for pad in pads if pad is not None)
        self._start = self._after = (
            0,
            0,
        )  # the block's first row, and the row behind its last: (file, row)
        self._index = self._offset = 0  # the document in the block, the token in the document
        self._block: list[Row] | None = None
        self._document: Document | None = None
        self._truncated = False  # whether that document lost its end
        self._rows: Iterator[Row] | None = None

    def __next__(self) -> Sequence:
        pieces: list[list[int]] = []
        room = self._seq_length
        while room and (self._packing or not pieces):
            tokens = self._current().tokens
            left = len(tokens) - self._offset
            if left > room and pieces and self._overlong != "split":
                break
            piece = self._take(tokens, min(left, room))
            pieces.append(piece)
            room -= len(piece)
        self.counts.padding += room
        return lay(pieces, self._seq_length, self._pad_id)

    def _take(self, tokens: list[int], amount: int) -> list[int]:
        """Return the next tokens of the document, count them and move the place behind them.

        Counted here and not when the document is read: a document read ahead is read again after a
        resume.
        """
        begin, end = self._offset, self._offset + amount
        if begin == 0:
            self.counts.documents += 1
            self.counts.split += end < len(tokens)
            self.counts.truncated += self._truncated
        self.counts.tokens += amount
        self._offset = end
        if end == len(tokens):
            self._advance()
        return tokens[begin:end]

    def _current(self) -> Document:
        """Return the document at the place, passing by empty ones and, under "drop", long ones."""
        while self._document is None:
            row = self._row()
            tokens = encode_document(self._tokenizer, row.text)
            if not tokens:
                self.counts.empty += 1
                self._advance()
            elif len(tokens) > self._seq_length and self._overlong == "drop":
                self.counts.dropped += 1
                self._advance()
            else:
                self._truncated = self._overlong == "truncate" and len(tokens) > self._seq_length
                if self._truncated:
                    tokens = tokens[: self._seq_length]
                if self._offset >= len(tokens):
                    raise Fault(f"data has changed since the checkpoint: {row.source} is shorter")
                self._document = Document(tokens, row.source)
        return self._document

    def _advance(self) -> None:
        assert self._block is not None
        self._document, self._offset = None, 0
        self._index += 1
        if self._index == len(self._block):
            self._block, self._index, self._start = None, 0, self._after

    def _row(self) -> Row:
        """Return the row at the place, reading its block, or the next epoch's first, if need be."""
        while self._block is None:
            block = self._read_block()
            if block:
                self._hold(block)
            elif self._start == (0, 0):
                raise no_documents(self._files)
            elif self.counts.documents == 0:
                raise Fault(
                    "no document can be used: those with text are all longer than "
                    f"seq_length = {self._seq_length} and overlong is '{self._overlong}'; "
                    "raise data.seq_length, or set data.overlong to split"
                )
            else:
                self.epoch += 1
                self._start, self._rows = (0, 0), None
        return self._block[self._index]

    def _hold(self, block: list[Row]) -> None:
        self._after = (block[-1].file, block[-1].row + 1)
        if self._shuffle_block > 1:
            # Seeded by the place: a block read again after a resume comes in the same order.
            random.Random(f"{self._seed}/{self.epoch}/{self._start}").shuffle(block)
        self._block = block

    def _read_block(self) -> list[Row]:
        if self._rows is None:
            rows = read_rows(self._files, text_field=self._text_field, start=self._start)
            self._rows = usable(rows, self._on_bad_line, self.counts)
        try:
            return list(islice(self._rows, max(1, self._shuffle_block)))
        except Fault:
            # A generator that has raised is spent and would look like the end of the data at the
            # next call.
            self._rows = None
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the place and the counts, as JSON can hold them; valid between calls of next()."""
        return {
            "settings": self._settings(),
            "epoch": self.epoch,
            "start": list(self._start),
            "read": self._block is not None,
            "index": self._index,
            "offset": self._offset,
            "counts": asdict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of a state_dict: what follows is the same as never having stopped.

        Raises:
            Fault: the state is of other files or other settings than this stream's.
        """
        now = self._settings()
        for name, value in state["settings"].items():
            if now.get(name) != value:
                raise Fault(
                    f"data of the checkpoint had {name} = {value}, now it is {now.get(name)}: "
                    "no exact resume; restore it, or start without the checkpoint"
                )
        self.epoch = state["epoch"]
        file, row = state["start"]
        self._start = self._after = (file, row)
        self._index = self._offset = 0
        self._block = self._document = self._rows = None
        if state["read"]:
            block = self._read_block()
            if state["index"] >= len(block):
                raise Fault(f"data has changed since the checkpoint: row {row + 1} of {self._files[file].path} is gone")
            self._hold(block)
            self._index, self._offset = state["index"], state["offset"]
        # After the block was read again: its skipped rows are among these counts already.
        for name, value in state["counts"].items():
            setattr(self.counts, name, value)

    def _settings(self) -> dict[str, Any]:
        names = "\n".join(file.path.name for file in self._files)
        return {
            "files": f"{len(self._files)} ({hashlib.sha256(names.encode()).hexdigest()[:12]})",
            "text_field": self._text_field,
            "seq_length": self._seq_length,
            "packing": self._packing,
            "overlong": self._overlong,
            "shuffle_block": self._shuffle_block,
            "seed": self._seed,
        }
