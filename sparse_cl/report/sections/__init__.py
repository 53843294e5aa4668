"""Sections of a report, a file a probe: `section(records...) -> Section` from the JSON that results give."""
