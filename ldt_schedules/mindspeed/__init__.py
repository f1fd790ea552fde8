"""Our patches inside MindSpeed's trainers: their patch manager applies our declarations.

registration.py          a declared patch as MindSpeed's manager takes it
mm.py                    MindSpeed-MM: the model-json key `patch.layerwise_disaggregated_training` becomes ours
mm_microbatches.py       what the cloud is told of a vision-language microbatch of MindSpeed-MM
mm_vision_language.py    its model: chunks built and run as those of one pipeline, microbatches without images
llm.py, site.py          MindSpeed-LLM: one feature in the place of its three; the site is entered before it reads arguments

None of MindSpeed's code is here, and nothing of it is imported before it is asked for.
"""
