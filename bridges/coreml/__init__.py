"""The bridge to Core ML: `export.export_coreml` writes packages, `run.load` runs them on a Mac."""
