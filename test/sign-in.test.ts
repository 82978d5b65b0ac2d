/** From the server's URL to a tool's answer, with the stand-in tenant and two kinds of client. */
import assert from "node:assert/strict";
import { after, describe, test, type TestContext } from "node:test";
import { Connector, type ConnectorOptions, publishClientMetadata } from "./support/chatgpt.ts";
import { connect, Provider } from "./support/sdk-client.ts";
import { startServer } from "./support/server.ts";
import { ALICE, CLIENT_KINDS, configuredTenant, FIXED_CALLBACK_ID, FIXED_CLIENT } from "./support/tenant.ts";
import { isStrict, settingsFor, signIn, startTenant, SYMPTOMS, TENANT_KINDS } from "./support/tenant.ts";
import type { ClientKind, SettingName, TenantKind } from "./support/tenant.ts";

/** The server and a tenant that is configured for it as the README says. */
async function start(t: TestContext, kind: TenantKind, env: Record<string, string> = {}, tenantHost = "localhost") {
  const tenant = await startTenant({ kind });
  t.after(() => tenant.close());
  const AUTH0_DOMAIN = tenant.origin.replace("localhost", tenantHost);
  const server = await startServer({ AUTH0_DOMAIN, ...env });
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant(kind, server.url));
  return { tenant, url: server.url };
}

/** Links a server for Alice. */
async function link(t: TestContext, mcpServerUrl: string, options: Partial<ConnectorOptions> = {}) {
  const connector = new Connector({ mcpServerUrl, browser: (url) => signIn(url, ALICE), ...options });
  t.after(() => connector.close());
  await connector.link();
  return connector;
}

async function titles(connector: Connector): Promise<string[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  return (structuredContent as { tasks: { title: string }[] }).tasks.map(({ title }) => title);
}

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const clientDocuments = await publishClientMetadata();
after(async () => {
  await server.close();
  await clientDocuments.close();
  await tenant.close();
});

describe("Which way is yours", () => {
  function configure({ tenant: kind, way }: ClientKind, leftOut?: SettingName): void {
    Object.assign(tenant.settings, configuredTenant(kind, server.url, way, leftOut));
  }

  /** Links as this kind of client, with ChatGPT's form filled in as the README says, and stays signed in. */
  async function connectAs(t: TestContext, client: ClientKind, options: Partial<ConnectorOptions> = {}) {
    const connector = await link(t, server.url, {
      oidcEnabled: !isStrict(client),
      callbackId: FIXED_CALLBACK_ID,
      ...(client.way === "cimd" && { clientDocuments }),
      ...(client.way === "fixed" && { fixedClient: FIXED_CLIENT }),
      ...options,
    });
    // ChatGPT may refresh twice at once, for which only an application made by hand can be prepared.
    await Promise.all([connector.refresh(), client.way === "fixed" && connector.refresh()]);
    return connector;
  }

  for (const client of CLIENT_KINDS) {
    const name = `ChatGPT as a ${client.way} client of a ${client.tenant} tenant`;

    for (const includesIssuer of [false, true]) {
      test(`${name} is linked, with iss ${includesIssuer ? "included" : "left out"}`, async (t) => {
        configure(client);
        tenant.settings.includeIssuerInAuthorizationResponses = includesIssuer;
        const expected = includesIssuer
          ? "https://chatgpt.com/connector_platform_oauth_redirect"
          : `https://chatgpt.com/connector/oauth/${FIXED_CALLBACK_ID}`;
        for (const application of tenant.settings.applications) application.callbackUrls = [expected];
        const callbackId = includesIssuer ? undefined : FIXED_CALLBACK_ID;
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url(callbackId));
        let redirect: string | null = null;
        const browser = (url: URL) => {
          redirect = url.searchParams.get("redirect_uri");
          return signIn(url, ALICE);
        };
        const { profile } = await connectAs(t, client, { browser });
        assert.deepEqual([profile.id, redirect], [ALICE.sub, expected]);
      });
    }

    for (const leftOut of settingsFor(client)) {
      test(`${name} is stopped without ${leftOut}`, async (t) => {
        configure(client, leftOut);
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url());
        await assert.rejects(connectAs(t, client), { message: SYMPTOMS[leftOut](client) });
      });
    }

    if (isStrict(client)) {
      test(`${name} is stopped with OIDC enabled left ticked`, async (t) => {
        configure(client);
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url());
        await assert.rejects(connectAs(t, client, { oidcEnabled: true }), /OAUTH_OWNER_PROFILE_ID_MISSING/);
      });
    }

    if (client.way === "cimd") {
      test(`${name} is stopped by an error that names the document to import`, async (t) => {
        configure(client);
        await assert.rejects(connectAs(t, client), {
          message: `Oops!, something went wrong invalid_request: Unknown client: ${clientDocuments.url()}`,
        });
      });
    }

    if (client.way === "fixed") {
      test(`${name} needs no Action once OIDC enabled is unticked`, async (t) => {
        configure(client, "action");
        assert.equal((await connectAs(t, client, { oidcEnabled: false })).profile.id, ALICE.sub);
      });
    }
  }
});

for (const kind of TENANT_KINDS) {
  // A strict tenant issues no ID token: README, Step 7.
  const oidcEnabled = kind === "permissive";

  test(`on a ${kind} tenant a refreshed token reaches the same tasks, and a reused one ends the access`, async (t) => {
    const { url } = await start(t, kind);
    const connector = await link(t, url, { oidcEnabled });
    await connector.callTool("create_task", { title: "Still there" });
    const first = { ...connector.tokens };
    await connector.refresh();
    assert.notEqual(connector.tokens.refresh_token, first.refresh_token);
    assert.equal(connector.tokens.scope, first.scope);
    assert.deepEqual(await titles(connector), ["Still there"]);
    const second = { ...connector.tokens };
    Object.assign(connector.tokens, first);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
    Object.assign(connector.tokens, second);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
  });

  test(`the SDK's own client signs in on a ${kind} tenant, and refreshes when a token has expired`, async (t) => {
    const { tenant, url } = await start(t, kind);
    const provider = new Provider();
    await (await connect(url, provider, ALICE)).close();
    const { refresh_token } = provider.tokens() ?? {};
    provider.saveTokens({ ...provider.tokens(), access_token: await tenant.sign({ exp: 1 }), token_type: "Bearer" });
    const client = await connect(url, provider);
    t.after(() => client.close());
    const { structuredContent } = await client.callTool({ name: "get_profile" });
    assert.deepEqual(structuredContent, { id: ALICE.sub });
    assert.notEqual(provider.tokens()?.refresh_token, refresh_token);
  });

  test(`with ENFORCE_SCOPES the SDK's client asks a ${kind} tenant for what the tools need`, async (t) => {
    const { url } = await start(t, kind, { ENFORCE_SCOPES: "true" });
    const provider = new Provider();
    const client = await connect(url, provider, ALICE);
    t.after(() => client.close());
    assert.deepEqual(provider.tokens()?.scope?.split(" ").toSorted(), ["offline_access", "tasks:read", "tasks:write"]);
    const { isError } = await client.callTool({ name: "create_task", arguments: { title: "Allowed" } });
    assert.notEqual(isError, true);
  });
}

test("with ENFORCE_SCOPES ChatGPT signs in again when a tool asks for it, and may then use it", async (t) => {
  const { url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  const connector = await link(t, url);
  const refused = await connector.callTool("create_task", { title: "Not yet" });
  assert.equal(refused.isError, true);
  const [challenge] = refused._meta?.["mcp/www_authenticate"] as string[];
  assert.match(challenge ?? "", /^Bearer error="insufficient_scope".*scope="[^"]*tasks:write/);
  await connector.link();
  assert.notEqual((await connector.callTool("create_task", { title: "Now" })).isError, true);
  assert.deepEqual(await titles(connector), ["Now"]);
});

test("a permission granted by RBAC allows the tool without being in scope", async (t) => {
  const { tenant, url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  tenant.settings.users = [{ ...ALICE, permissions: ["tasks:read"] }];
  for (const api of tenant.settings.apis) api.enableRbac = true;
  const connector = await link(t, url);
  assert.deepEqual(await titles(connector), []);
  assert.equal((await connector.callTool("create_task", { title: "No" })).isError, true);
});

test("a user who declines leaves ChatGPT with access_denied", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  const browser = (authorizeUrl: URL) => signIn(authorizeUrl, ALICE, "decline");
  for (const includesIssuer of [false, true]) {
    tenant.settings.includeIssuerInAuthorizationResponses = includesIssuer;
    await assert.rejects(link(t, url, { browser }), /^Error: access_denied/);
  }
});

test("ChatGPT refuses an answer, or an error, without the iss that was promised, or with another", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const browser = async (authorizeUrl: URL) => {
    const callback = await signIn(authorizeUrl, ALICE);
    callback.searchParams.set("iss", tenant.origin); // the slash is missing
    return callback;
  };
  await assert.rejects(link(t, url, { browser }), /iss http:\/\/localhost:\d+, expected \S+\/$/);
  tenant.withholdsIssuer = true;
  for (const decision of ["accept", "decline"] as const) {
    const options = { browser: (authorizeUrl: URL) => signIn(authorizeUrl, ALICE, decision) };
    await assert.rejects(link(t, url, options), /has the iss \(none\), expected http/);
  }
});

test("ChatGPT uses a callback for each connection where the server names the issuer differently", async (t) => {
  const { tenant, url } = await start(t, "permissive", {}, "127.0.0.1");
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const browser = (authorizeUrl: URL) => Promise.reject(new Error(authorizeUrl.href));
  await assert.rejects(link(t, url, { browser, callbackId: "one" }), /connector%2Foauth%2Fone&/);
});
