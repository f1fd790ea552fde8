"""Our patches inside MindSpeed's trainers: their patch manager applies our declarations.

registration.py    a declared patch as MindSpeed's manager takes it
mm.py              MindSpeed-MM: the model-json key `patch.layerwise_disaggregated_training` becomes ours
llm.py, site.py    MindSpeed-LLM: one feature of ours in the place of its three; the site is entered before it reads arguments

None of MindSpeed's code is here, and nothing of it is imported before it is asked for.
"""
