"""The method of the papers: one iteration, sample -> score -> credit -> learn. Imports nothing of core above itself."""
