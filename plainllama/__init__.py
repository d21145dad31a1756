"""The rooms that the commands share, one wing for each state that the data passes through.

Below all wings: settings, command, files, progress, results, parallel, watch.
"""
