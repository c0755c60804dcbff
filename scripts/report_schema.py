"""Write docs/report.schema.json, what report.json holds: `python scripts/report_schema.py`."""

import json
from pathlib import Path

from pydantic import TypeAdapter

from trainer.report.schema import Report

PAGE = Path(__file__).parent.parent / "docs" / "report.schema.json"


def page() -> str:
    """The JSON Schema (draft 2020-12) as text."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(Report).json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
