"""One page about finished runs, fits, models and scorecards: pictures, tables, provenance."""
