"""The api process: HTTP, tokenising, incremental detokenising, stop strings, server-sent events. No torch."""
