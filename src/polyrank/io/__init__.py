"""Run folders on disk and, beside them, what PEFT reads and writes."""
