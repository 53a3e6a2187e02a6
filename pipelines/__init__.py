"""Runnable jobs: parse flags, call mdm, exit."""
