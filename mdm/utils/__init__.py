"""What every layer uses: files, ranks, command lines, precision, MLflow, exit codes."""
