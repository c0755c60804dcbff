"""Write docs/report.schema.json, the JSON Schema of report.json: `python scripts/report_schema.py`."""

import json
from pathlib import Path

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from trainer.report.schema import Report

PAGE = Path(__file__).parent.parent / "docs" / "report.schema.json"


class _WithoutFieldTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - "Val Loss" repeats the key
        return False


def format_schema() -> str:
    """Format the content of docs/report.schema.json, a JSON Schema of draft 2020-12."""
    schema = TypeAdapter(Report).json_schema(schema_generator=_WithoutFieldTitles)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


if __name__ == "__main__":
    PAGE.write_text(format_schema(), encoding="utf-8")
