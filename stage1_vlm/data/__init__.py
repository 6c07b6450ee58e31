"""Driving questions and answers: mixture of data sets, line index, examples, batches."""
