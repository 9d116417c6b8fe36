"""The probe: at deployment, how strongly may this model's KV be coded?"""
