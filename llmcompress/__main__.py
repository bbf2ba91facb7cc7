"""`python -m llmcompress`."""

from llmcompress.cli import main

main()
