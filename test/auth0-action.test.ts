/** Which scopes the post-login Action adds to a token, run as Auth0 runs it. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { ACTION_CODE, loadAction, OIDC_SCOPES, type PostLoginAction } from "./support/tenant.ts";

/** The scopes that the Action adds at a login. */
async function grantedAt(event: Parameters<PostLoginAction>[0], code = ACTION_CODE): Promise<string[]> {
  const added: string[] = [];
  await loadAction(code)(event, { accessToken: { addScope: (scope) => added.push(scope) } });
  return added;
}

const askedFor = (...scopes: string[]) => ({ transaction: { requested_scopes: scopes } });

test("the Action grants every scope that Auth0 advertises when all of them were asked for", async () => {
  assert.deepEqual(await grantedAt(askedFor(...OIDC_SCOPES)), OIDC_SCOPES);
});

test("the Action grants no scope that was not asked for", async () => {
  assert.deepEqual(await grantedAt(askedFor("offline_access", "openid")), ["openid", "offline_access"]);
  assert.deepEqual(await grantedAt(askedFor()), []);
});

test("the Action grants no permission of an API, whoever asks", async () => {
  assert.deepEqual(await grantedAt(askedFor("tasks:write", "email", "admin")), ["email"]);
});

test("where Auth0 does not say what was asked, as at a refresh, the Action grants all that it advertises", async () => {
  for (const event of [{}, { transaction: { protocol: "oauth2-refresh-token" } }]) {
    assert.deepEqual(await grantedAt(event), OIDC_SCOPES);
  }
});

test("the Action with its line that limits it to one API grants nothing for another", async () => {
  const limited = ACTION_CODE.replace("// if (", "if (");
  const grantedFor = (resource_server?: object) => grantedAt({ ...askedFor("openid"), resource_server }, limited);
  assert.deepEqual(await grantedFor({ identifier: "https://your-domain.com/mcp" }), ["openid"]);
  assert.deepEqual(await grantedFor({ identifier: "https://example.com/billing" }), []);
  assert.deepEqual(await grantedFor(), []);
});
