"""Data of vision-language training: conversations with images and videos. The edge only.

samples     the users' file: one conversation a line, checked line by line
charts      what is trained on without a file: drawn charts, questions and answers
pixels      images and frames to patches and grids
chat        a conversation to token ids, with the assistant's marked
preparing   both together: one sample, ready for a batch, or what is wrong with it
batching    padded microbatches, dealt over the data-parallel replicas
dealing     which sample of a global batch goes where, so that image work is balanced
"""
