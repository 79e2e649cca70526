"""What a run did and cost, from its files alone: sections of figures, tables and charts (docs/reports.md).

`figures` says what a report consists of; `load` opens a run; each other module makes one section. Nothing here writes,
and nothing here knows how a report is shown.
"""
