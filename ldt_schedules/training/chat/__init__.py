"""Conversations: how users write them, how they become ids, and samples of several of them. The edge only.

samples        JSONL to messages, every mistake with its file and line     (also of conversations with images)
writing        messages to ids, the assistant's marked                     (also with images)
conversations  all of a file as ids, cut where they are too long
packing        which of them share a sample
batching       samples to microbatches
library        conversations that every machine has
"""
