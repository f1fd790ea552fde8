"""Data of vision-language training: conversations (`training/chat`) with images and videos. The edge only.

charts      what is trained on without a file: drawn charts, questions and answers
pixels      images and frames to patches and grids
preparing   messages and pictures: one sample, ready for a batch, or what is wrong with it
batching    padded microbatches, dealt over the data-parallel replicas
dealing     which sample of a global batch goes where, so that image work is balanced
"""
