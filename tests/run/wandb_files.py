"""What wandb keeps of an offline run: the rows of its history, read from its own file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

BLOCK = 32768  # of LevelDB's log format: records in pieces that lie within a block each
FULL, LAST = 1, 4  # kinds of the pieces that end a record


def history(path: Path) -> list[dict[str, Any]]:
    """Rows in the order in which they were logged, with wandb's own ``_step``."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    rows, record, place = [], b"", 7
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:  # no piece begins there
            place += BLOCK - place % BLOCK
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (FULL, LAST):
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows
