//! Measurements: see `RESULTS.md`.
