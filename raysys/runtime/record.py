"""Which run a folder holds: `run.json`, written once, before anything else.

The run exists from the moment its config.yaml is there (written after run.json); a folder without both is no run.
"""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, ValidationError

from raysys.runtime.sentences import UserError
from raysys.runtime.storage import Storage

FORMAT = 1


class Record(BaseModel):
    """Identity of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    id: str
    system: str
    command: str
    argv: list[str]
    created: str
    version: str

    @classmethod
    def of(cls, storage: Storage) -> Record:
        """Read the record of the run in `storage`; UserError if there is no (whole) run of a known format."""
        try:
            present = storage.exists("run.json") and storage.exists("config.yaml")
            record = cls.model_validate_json(storage.read_bytes("run.json")) if present else None
        except (OSError, ValidationError) as error:
            raise UserError(f"resume: got {storage.uri}, whose run.json is damaged; expected a run folder") from error
        if record is None:
            raise UserError(f"resume: got {storage.uri}; expected a run folder, which holds run.json and config.yaml")
        if record.format != FORMAT:
            raise UserError(f"resume: got a run of format {record.format}; this version reads format {FORMAT}")
        return record

    def save(self, storage: Storage) -> None:
        storage.write_bytes("run.json", json.dumps(self.model_dump(), indent=2).encode())
