"""Print the folder of the tasks."""

from healthslm.evaluation.lm_eval_tasks import FOLDER

print(FOLDER)
